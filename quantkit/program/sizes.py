"""Integers that remember which sizes they were computed from, so that a recorded call can be repeated at other sizes.

While a model is recorded, ``x.shape`` and ``x.size()`` give ``Size``s instead of plain integers. They are integers in
every respect, so that the model's code and torch take them as they are; what the code computes from them by whole
numbers is a ``Size`` again. Where one reaches the arguments of a call, its expression is recorded in its place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Shapes = Mapping[int, tuple[int, ...]]  # of values, by number


@dataclass(frozen=True)
class Extent:
    """The size of a value along one axis."""

    number: int
    axis: int

    def evaluate(self, shapes: Shapes) -> int:
        return shapes[self.number][self.axis]

    def numbers(self) -> set[int]:
        """The values whose shapes are asked for."""
        return {self.number}

    def moved(self, numbers: Mapping[int, int]) -> Extent:
        """The same, of values that have other numbers now."""
        return Extent(numbers.get(self.number, self.number), self.axis)


@dataclass(frozen=True)
class Computed:
    """A whole number computed from two others, of which at least one follows a size."""

    function: Callable[[int, int], int]
    left: Expression
    right: Expression

    def evaluate(self, shapes: Shapes) -> int:
        return self.function(_evaluated(self.left, shapes), _evaluated(self.right, shapes))

    def numbers(self) -> set[int]:
        return {n for side in (self.left, self.right) if not isinstance(side, int) for n in side.numbers()}

    def moved(self, numbers: Mapping[int, int]) -> Computed:
        left, right = (s if isinstance(s, int) else s.moved(numbers) for s in (self.left, self.right))
        return Computed(self.function, left, right)


Expression = Extent | Computed | int


def _evaluated(expression: Expression, shapes: Shapes) -> int:
    return expression if isinstance(expression, int) else expression.evaluate(shapes)


class Size(int):
    """An integer with the expression it came from; ``recording`` is the recorder whose numbers the expression has."""

    expression: Extent | Computed
    recording: object

    def __new__(cls, value: int, expression: Extent | Computed, recording: object) -> Size:
        size = super().__new__(cls, value)
        size.expression, size.recording = expression, recording
        return size

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)  # copies and files hold the number alone


def _remembering(function: Callable[[Any, Any], Any], reflected: bool) -> Callable[[Size, Any], Any]:
    """An operator of ``int`` whose result keeps its expression."""

    def compute(self: Size, other: Any) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        plain = (int(other), int(self)) if reflected else (int(self), int(other))
        value = function(*plain)
        expressions: list[Expression] = [self.expression, int(other)]
        if isinstance(other, Size):
            if other.recording is not self.recording:
                return value
            expressions[1] = other.expression
        left, right = reversed(expressions) if reflected else expressions
        return Size(value, Computed(function, left, right), self.recording)

    return compute


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    setattr(Size, f"__{_name}__", _remembering(getattr(operator, _name), reflected=False))
    setattr(Size, f"__r{_name}__", _remembering(getattr(operator, _name), reflected=True))


def negated(self: Size) -> Size:
    """``-size``, as in ``x[:, -length:]``."""
    return Size(-int(self), Computed(operator.sub, 0, self.expression), self.recording)


Size.__neg__ = negated  # type: ignore[method-assign, assignment]
