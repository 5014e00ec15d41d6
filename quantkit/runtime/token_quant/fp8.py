"""FP8 numbers (E4M3): rounding to them, and the least scale of a row of them."""

from __future__ import annotations

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def to_e4m3(x: Tensor) -> Tensor:
    """float32 rounded to FP8 E4M3, clamped first: what lies beyond is NaN on some devices."""
    return x.clamp(-LARGEST, LARGEST).to(E4M3)
