"""Ranges without data: half-quadratic quantization, which lets few weights be far off so that most are close.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023): the error is measured in the
l_p norm, p = 0.7; a shrunken error is set aside, and the rest is fitted in closed form, in turns. The paper fits the
zero point; where a format has none, its scale is fitted the same way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.formats import WeightFormat
from quantkit.numbers.scales import ScaleGrid
from quantkit.numbers.uniform import dequantize, quantize
from quantkit.ranges.weights import group_ranges
from quantkit.rounding.moments import Moments
from quantkit.rounding.nearest import nearest_codes
from quantkit.rounding.registry import Codes, rounding

STEPS = 20
POWER = 0.7
_BETA, _GROWTH = 10.0, 1.01


@rounding("hqq")
def hqq(rows: Tensor, format: WeightFormat, moments: Moments | None) -> Codes:
    """The code nearest to every weight in half-quadratic ranges."""
    scale, zero = group_ranges(rows, format)
    groups = rows.reshape(*scale.shape, -1)
    scale, zero = (x.squeeze(-1) for x in hqq_range(groups, format, scale.unsqueeze(-1), zero.unsqueeze(-1)))
    scale = ScaleGrid.of(scale, format).nearest(scale)
    return nearest_codes(rows, format, scale, zero), scale, zero


def hqq_range(weight: Tensor, format: WeightFormat, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point (..., 1) of each row of ``weight`` (..., inputs), from those given; the best seen."""
    low, high = format.code_range
    best, best_zero, beta = scale, zero, _BETA
    unit = weight.abs().mean(-1, keepdim=True).clamp(min=1e-30)  # the paper's constants fit weights of this size
    lowest = _error(weight / unit, scale / unit, zero, low, high)
    trial, offset = scale, zero
    for _ in range(STEPS):
        codes = quantize(weight, trial, offset, low, high)
        error = (weight - dequantize(codes, trial, offset)) / unit
        kept = weight - unit * _shrunk(error, beta)
        if format.zero_point:
            offset = torch.round((codes - kept / trial).mean(-1, keepdim=True)).clamp(low, high)
        steps = codes - offset
        fitted = (kept * steps).sum(-1, keepdim=True) / steps.square().sum(-1, keepdim=True).clamp(min=1)
        trial = torch.where(fitted.abs() > 0, fitted, trial)
        found = _error(weight / unit, trial / unit, offset, low, high)
        better = found < lowest
        best, best_zero = torch.where(better, trial, best), torch.where(better, offset, best_zero)
        lowest, beta = torch.where(better, found, lowest), beta * _GROWTH
    return best, best_zero


def _shrunk(error: Tensor, beta: float) -> Tensor:
    """The error that is set aside: the generalized soft threshold of the l_p norm."""
    size = error.abs().clamp(min=1e-8)
    return error.sign() * (size - size.pow(POWER - 1) / beta).clamp(min=0)


def _error(weight: Tensor, scale: Tensor, zero: Tensor, low: float, high: float) -> Tensor:
    rounded = dequantize(quantize(weight, scale, zero, low, high), scale, zero)
    return (weight - rounded).abs().pow(POWER).sum(-1, keepdim=True)
