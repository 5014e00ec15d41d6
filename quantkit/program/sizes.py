"""Numbers that remember which sizes they were computed from, so that a recorded call can be repeated at other sizes.

While a model is recorded, ``x.shape`` and ``x.size()`` give ``Size``s instead of plain integers. They are integers in
every respect, so that the model's code and torch take them as they are; what the code computes from them is a ``Size``
again, or a ``Ratio`` where it is no whole number. Where one reaches the arguments of a call, its expression is
recorded in its place. Python takes one for a plain number in ``int(x)``, in calls of ``math``, and on the right of a
float.
"""

from __future__ import annotations

import math
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
    """A number computed from others, of which at least one follows a size."""

    function: Callable[..., Any]
    operands: tuple[Expression, ...]

    def evaluate(self, shapes: Shapes) -> Any:
        return self.function(*(x if isinstance(x, int | float) else x.evaluate(shapes) for x in self.operands))

    def numbers(self) -> set[int]:
        return {n for x in self.operands if not isinstance(x, int | float) for n in x.numbers()}

    def moved(self, numbers: Mapping[int, int]) -> Computed:
        moved = (x if isinstance(x, int | float) else x.moved(numbers) for x in self.operands)
        return Computed(self.function, tuple(moved))


Expression = Extent | Computed | int | float


class Size(int):
    """An integer with the expression it came from; ``recording`` is the recorder whose numbers the expression has."""

    expression: Extent | Computed
    recording: object

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)  # copies and files hold the number alone


class Ratio(float):
    """A float with the expression it came from, as ``Size``."""

    expression: Extent | Computed
    recording: object

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        return float, (float(self),)


def following(value: float, expression: Extent | Computed, recording: object) -> Any:
    """A number that remembers its expression."""
    number = Size(value) if isinstance(value, int) else Ratio(value)
    number.expression, number.recording = expression, recording
    return number


def _plain(value: float) -> int | float:
    return int(value) if isinstance(value, int) else float(value)


def _remembering(function: Callable[..., Any], reflected: bool = False) -> Callable[..., Any]:
    """An operator on numbers whose result keeps its expression."""

    def compute(self: Size | Ratio, *others: Any) -> Any:
        if not all(isinstance(other, int | float) for other in others):
            return NotImplemented
        given = (*others, self) if reflected else (self, *others)
        value = function(*map(_plain, given))
        known = [x for x in given if isinstance(x, Size | Ratio)]
        if any(x.recording is not self.recording for x in known):
            return value
        operands = tuple(x.expression if isinstance(x, Size | Ratio) else _plain(x) for x in given)
        return following(value, Computed(function, operands), self.recording)

    return compute


for _type in (Size, Ratio):
    for _name in ("add", "sub", "mul", "floordiv", "mod", "truediv", "pow"):
        setattr(_type, f"__{_name}__", _remembering(getattr(operator, _name)))
        setattr(_type, f"__r{_name}__", _remembering(getattr(operator, _name), reflected=True))
    for _function in (operator.neg, operator.abs, math.floor, math.ceil, math.trunc, round):
        setattr(_type, f"__{_function.__name__}__", _remembering(_function))
