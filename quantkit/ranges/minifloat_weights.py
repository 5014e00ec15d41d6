"""Scales of weights in floating-point numbers: the largest magnitude becomes the largest number."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.formats import WeightFormat
from quantkit.numbers.scales import E8M0, ScaleGrid


def minifloat_scale(weight: Tensor, format: WeightFormat) -> Tensor:
    """The scale (..., 1) of each row of ``weight`` (..., inputs): max |w| / the largest number, of those that the
    format stores; of powers of two 2^(floor(log2 max |w|) - 2) (OCP Microscaling Formats, section 6.3).
    """
    largest = weight.abs().amax(-1, keepdim=True)
    ones = torch.ones_like(largest)
    top = format.code_range[1]
    if format.scale == E8M0:
        powers = torch.frexp(largest).exponent - torch.frexp(torch.tensor(top)).exponent
        found = torch.where(largest > 0, torch.ldexp(ones, powers), ones)
    else:
        found = torch.where(largest > 0, largest / top, ones)
    return ScaleGrid.of(found, format).nearest(found)
