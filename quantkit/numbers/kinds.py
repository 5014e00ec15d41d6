"""The kinds of quantized numbers, by the names that files and tables of forms know them by. A new kind is a class
beside these and an entry here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantkit.errors import CorruptFile
from quantkit.numbers.logarithmic import LogRange
from quantkit.numbers.per_token import TokenRange
from quantkit.numbers.uniform import QuantizedWeight, SiteRange

AnyRange = SiteRange | LogRange | TokenRange
AnyQuantizer = QuantizedWeight | AnyRange
KINDS: dict[str, type[AnyQuantizer]] = {k.kind: k for k in (QuantizedWeight, SiteRange, LogRange, TokenRange)}


def from_dict(record: Mapping[str, Any]) -> AnyQuantizer:
    """The quantizer whose ``to_dict`` a file holds. Raises CorruptFile for a kind that is not known."""
    kind = record.get("kind", "")
    if kind not in KINDS:
        raise CorruptFile(f"A quantizer of kind {kind!r} was found in a file; known: {', '.join(KINDS)}.")
    return KINDS[kind].from_dict(record)


def range_of(record: Mapping[str, Any]) -> AnyRange:
    """``from_dict`` of the quantizer of a site."""
    found = from_dict(record)
    if found.stored:
        raise CorruptFile(f"A site has a quantizer of kind {found.kind!r}, which is one of weights.")
    return found
