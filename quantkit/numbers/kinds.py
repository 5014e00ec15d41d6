"""The kinds of quantized numbers, by the names that files and tables of forms know them by. A new kind is a class
beside these and an entry here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import CorruptFile
from quantkit.formats import ActivationFormat, Scheme, WeightFormat
from quantkit.numbers.half import HalfWeight
from quantkit.numbers.logarithmic import LogRange
from quantkit.numbers.minifloat import MINIFLOATS
from quantkit.numbers.minifloat_tokens import MinifloatTokens
from quantkit.numbers.minifloat_weight import MinifloatWeight
from quantkit.numbers.per_token import TokenRange
from quantkit.numbers.uniform import QuantizedWeight, SiteRange

AnyRange = SiteRange | LogRange | TokenRange | MinifloatTokens
AnyWeight = QuantizedWeight | MinifloatWeight | HalfWeight
AnyQuantizer = AnyWeight | AnyRange
KINDS: dict[str, type[AnyQuantizer]] = {
    k.kind: k for k in (QuantizedWeight, MinifloatWeight, HalfWeight, SiteRange, LogRange, TokenRange, MinifloatTokens)
}


def from_dict(record: Mapping[str, Any]) -> AnyQuantizer:
    """The quantizer whose ``to_dict`` a file holds. Raises CorruptFile for a kind that is not known."""
    kind = record.get("kind", "")
    if kind not in KINDS:
        raise CorruptFile(f"A quantizer of kind {kind!r} was found in a file; known: {', '.join(KINDS)}.")
    return KINDS[kind].from_dict(record)


def weight_of(record: Mapping[str, Any]) -> AnyWeight:
    """The weight that the tensors of its ``to_dict``, and its ``format``, belong to."""
    format = Scheme.parse(record["format"]).weight
    assert format is not None, "written by to_dict"
    kind = QuantizedWeight if format.is_integer else HalfWeight if format.is_half else MinifloatWeight
    return kind.from_dict(record)


def rounded_weight(codes: Tensor, scale: Tensor, zero: Tensor, format: WeightFormat) -> AnyWeight:
    """A weight from codes as floats, in its shape, and scales and zero points (O, groups)."""
    if not format.is_integer:
        return MinifloatWeight(MINIFLOATS[format.fmt].encode(codes), scale.float(), format)
    zeros = zero.to(torch.int8) if format.zero_point else None
    return QuantizedWeight(codes.to(torch.int8), scale.float(), zeros, format)


def token_range(format: ActivationFormat) -> TokenRange | MinifloatTokens:
    """The quantizer of tokens in a dynamic format."""
    return TokenRange(format.bits) if format.is_integer else MinifloatTokens(format.fmt)


def range_of(record: Mapping[str, Any]) -> AnyRange:
    """``from_dict`` of the quantizer of a site."""
    found = from_dict(record)
    if found.stored:
        raise CorruptFile(f"A site has a quantizer of kind {found.kind!r}, which is one of weights.")
    return found
