"""The kinds of quantized numbers, by the names that files and tables of forms know them by. A new kind is a class
beside these and an entry here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantkit.errors import CorruptFile
from quantkit.formats import Scheme
from quantkit.numbers.half import HalfWeight
from quantkit.numbers.logarithmic import LogRange
from quantkit.numbers.per_token import TokenRange
from quantkit.numbers.uniform import QuantizedWeight, SiteRange

AnyRange = SiteRange | LogRange | TokenRange
AnyWeight = QuantizedWeight | HalfWeight
AnyQuantizer = AnyWeight | AnyRange
KINDS: dict[str, type[AnyQuantizer]] = {
    k.kind: k for k in (QuantizedWeight, HalfWeight, SiteRange, LogRange, TokenRange)
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
    return (HalfWeight if format is not None and format.is_half else QuantizedWeight).from_dict(record)


def range_of(record: Mapping[str, Any]) -> AnyRange:
    """``from_dict`` of the quantizer of a site."""
    found = from_dict(record)
    if found.stored:
        raise CorruptFile(f"A site has a quantizer of kind {found.kind!r}, which is one of weights.")
    return found
