"""The arguments of a recorded call, with references in the place of tensors and of numbers that follow sizes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.program.sizes import Computed, Extent, Ratio, Shapes, Size


@dataclass(frozen=True)
class Ref:
    """Stands for the tensor of a number."""

    number: int


@dataclass(frozen=True)
class SizeRef:
    """Stands for a whole number that follows sizes."""

    expression: Extent | Computed

    def moved(self, numbers: Mapping[int, int]) -> SizeRef:
        """The same, of values that have other numbers now."""
        return SizeRef(self.expression.moved(numbers))


@dataclass(frozen=True)
class SliceRef:
    """Stands for a slice of which a part follows sizes, or is a tensor."""

    start: Any
    stop: Any
    step: Any


Replace = Callable[[Any], Any]


def replaced(value: Any, replace: Replace) -> Any:
    """A nested argument with ``replace`` applied to all that is no container; equal containers stay themselves."""
    if isinstance(value, tuple | list):
        items = [replaced(item, replace) for item in value]
        if type(value) is not torch.Size and all(new is old for new, old in zip(items, value, strict=True)):
            return value
        if isinstance(value, list):
            return items
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, dict):
        own = copy.copy(value)  # of its class: what an encoder of transformers returns is read by number, too
        for name, item in value.items():
            own[name] = replaced(item, replace)
        return own
    if isinstance(value, slice | SliceRef):
        parts = [replaced(part, replace) for part in (value.start, value.stop, value.step)]
        return SliceRef(*parts) if any(isinstance(part, Ref | SizeRef) for part in parts) else value
    return replace(value)


def frozen(value: Any, number: Callable[[Tensor], int], recording: object) -> Any:
    """Arguments with references for tensors and for the sizes that ``recording`` gave out."""

    def reference(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return Ref(number(leaf))
        if isinstance(leaf, Size | Ratio):
            plain = int(leaf) if isinstance(leaf, Size) else float(leaf)
            return SizeRef(leaf.expression) if leaf.recording is recording else plain
        return leaf

    return replaced(value, reference)


def thawed(value: Any, values: Mapping[int, Tensor], shapes: Shapes) -> Any:
    """The arguments of a call from those that ``frozen`` made, given the tensors and the shapes that they refer to."""
    if isinstance(value, Ref):
        return values[value.number]
    if isinstance(value, SizeRef):
        return value.expression.evaluate(shapes)
    if isinstance(value, SliceRef):
        return slice(*(thawed(part, values, shapes) for part in (value.start, value.stop, value.step)))
    if isinstance(value, list):
        return [thawed(item, values, shapes) for item in value]
    if isinstance(value, tuple):
        items = [thawed(item, values, shapes) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, dict):
        return {name: thawed(item, values, shapes) for name, item in value.items()}
    return value


def leaves_of(value: Any) -> Iterator[Any]:
    """All that is no container in a nested argument, the parts of slices too."""
    if isinstance(value, tuple | list):
        for item in value:
            yield from leaves_of(item)
    elif isinstance(value, dict):
        yield from leaves_of(list(value.values()))
    elif isinstance(value, slice | SliceRef):
        yield from leaves_of((value.start, value.stop, value.step))
    else:
        yield value
