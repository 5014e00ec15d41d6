"""Rounding to the codes of a weight format, whatever its numbers are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from quantkit.formats import WeightFormat
from quantkit.numbers.minifloat import MINIFLOATS, Minifloat
from quantkit.numbers.uniform import quantize

Rounder = Callable[[Tensor, Tensor, Tensor], Tensor]  # of values, their scale and zero point: codes as floats


def rounder(format: WeightFormat) -> Rounder:
    """The nearest codes of a format: whole numbers, or floating-point numbers as they are."""
    return whole_numbers(*format.code_range) if format.is_integer else partial(_nearest, MINIFLOATS[format.fmt])


def whole_numbers(low: float, high: float) -> Rounder:
    """The nearest of the integers between two."""
    return partial(quantize, low=low, high=high)


def _nearest(numbers: Minifloat, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return numbers.nearest(x / scale)
