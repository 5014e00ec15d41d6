"""Scales of weights in floating-point numbers: those that formats define, and a search around them for the least
squared error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.formats import WeightFormat
from quantkit.numbers.minifloat import MINIFLOATS
from quantkit.numbers.scales import E8M0, ScaleGrid, with_scales_of_others

# Tried of the scale at which the largest magnitude becomes the largest number; powers of two have no others between.
FACTORS = (1.0, *torch.linspace(0.7, 1.9, 25, device="cpu").tolist())
POWERS = (1.0, 2.0)


def defined_scale(weight: Tensor, format: WeightFormat) -> Tensor:
    """The scale (..., 1) of each row of ``weight`` (..., inputs) by definition, before it is stored: max |w| / the
    largest number; of powers of two 2^(floor(log2 max |w|) - 2) (OCP Microscaling Formats, section 6.3).
    """
    largest = weight.abs().amax(-1, keepdim=True)
    ones, top = torch.ones_like(largest), format.code_range[1]
    if format.scale != E8M0:
        return with_scales_of_others(torch.where(largest > 0, largest / top, ones), largest > 0)
    power = torch.frexp(largest).exponent - torch.frexp(torch.tensor(top, device="cpu")).exponent.to(largest.device)
    return torch.where(largest > 0, torch.ldexp(ones, power), ones)


def minifloat_scale(weight: Tensor, format: WeightFormat, importance: Tensor | None = None) -> Tensor:
    """The scale (..., 1) of each row, of those that the format stores, with the least squared rounding error among
    multiples of the defined one, which ties keep. ``importance`` (broadcastable to the weight) weighs the errors.
    """
    base, numbers = defined_scale(weight, format), MINIFLOATS[format.fmt]
    grid = ScaleGrid.of(base, format)
    best, least = grid.nearest(base), torch.full_like(base, torch.inf)
    for factor in POWERS if format.scale == E8M0 else FACTORS:
        scale = grid.nearest(base * factor)
        missed = numbers.nearest(weight / scale).mul_(scale).sub_(weight).square_()
        error = (missed if importance is None else missed * importance).sum(-1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best
