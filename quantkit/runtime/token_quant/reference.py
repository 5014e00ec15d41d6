"""Dynamic FP8 quantization of rows, in plain math, alone or after an RMSNorm."""

from __future__ import annotations

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def to_e4m3(x: Tensor) -> Tensor:
    """float32 rounded to FP8 E4M3, clamped first: what lies beyond is NaN on some devices."""
    return x.clamp(-LARGEST, LARGEST).to(E4M3)


def rms_norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """float32 rows divided by their root mean square, times ``gain``."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * gain.float()


def quantize_rows_fp8_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """(FP8 codes, float32 scale) of every row: its largest magnitude becomes 448."""
    x = x.float()
    largest = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    scale = (largest / LARGEST).clamp_min(SMALLEST_SCALE)
    return to_e4m3(x / scale.unsqueeze(-1)), scale
