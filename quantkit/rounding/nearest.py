"""Rounding to nearest, with ranges of least squared error."""

from __future__ import annotations

from torch import Tensor

from quantkit.formats import WeightFormat
from quantkit.numbers.rounder import rounder
from quantkit.ranges.weights import group_ranges, per_input
from quantkit.rounding.moments import Moments
from quantkit.rounding.registry import Codes, rounding


@rounding("nearest", minifloats=True)
def nearest(rows: Tensor, format: WeightFormat, moments: Moments | None) -> Codes:
    """The code nearest to every weight."""
    scale, zero = group_ranges(rows, format)
    return nearest_codes(rows, format, scale, zero), scale, zero


def nearest_codes(rows: Tensor, format: WeightFormat, scale: Tensor, zero: Tensor) -> Tensor:
    """Codes of ``rows`` (..., K) under scales and zero points of groups (..., scales)."""
    size = rows.shape[-1]
    return rounder(format)(rows, per_input(scale, size), per_input(zero, size))
