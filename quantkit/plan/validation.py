"""Checks of what a file holds against the records it is read into: files get edited."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

Record = TypeVar("Record")


def check_types(record: type, values: Mapping[str, Any]) -> None:
    """Raise TypeError for the first value that is not what the record's field of that name holds."""
    hints = get_type_hints(record)
    for name, value in values.items():
        if name in hints and not _fits(value, hints[name]):
            raise TypeError(f"{name} is {value!r:.60}, expected {record.__annotations__[name]}")


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is UnionType:
        return any(_fits(value, option) for option in inner)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if origin is tuple:
        each = inner[:1] * len(value) if inner[-1] is Ellipsis and isinstance(value, tuple) else inner
        return isinstance(value, tuple) and len(value) == len(each) and all(map(_fits, value, each))
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool) and abs(value) < math.inf
    return isinstance(value, hint)


def frozen_lists(data: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's lists, and lists in them, as the tuples the records hold."""

    def frozen(value: Any) -> Any:
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    return {key: frozen(value) for key, value in data.items()}


def record_of(kind: type[Record], data: Mapping[str, Any]) -> Record:
    """The record of a kind that JSON data holds; raises TypeError for a field of another type."""
    values = frozen_lists(data)
    check_types(kind, values)
    return kind(**values)


def refuse_constant(text: str) -> None:
    """Raise ValueError for NaN and the infinities, which JSON's readers let pass."""
    raise ValueError(f"{text} is not a number in JSON")
