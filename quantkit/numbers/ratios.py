"""Ratios of channels: what is read is divided by them before it gets codes, and the weight that reads it is multiplied
by them before it does, so that their product stays what it was (docs/methods/scaled-reads.md).

Ratios are powers of two: dividing by them and multiplying with them are exact, and a file holds small integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

Ratio = tuple[int, ...]  # the exponent of each channel, the last dimension; empty: all are one


def factors(ratio: Ratio, device: torch.device | str = "cpu") -> Tensor:
    """The ratio of each channel, float32."""
    return torch.exp2(torch.tensor(ratio, dtype=torch.float32, device=device))


def exponents(ratio: Tensor) -> Ratio:
    """The powers of two nearest to positive numbers, on a logarithmic scale, the largest being one."""
    powers = torch.round(torch.log2(ratio.double() / ratio.max()))
    return tuple(int(power) for power in powers)


def divided(x: Tensor, ratio: Ratio) -> Tensor:
    """``x`` (..., channels) divided by the ratio."""
    return x / factors(ratio, x.device).to(x.dtype) if ratio else x


def multiplied(x: Tensor, ratio: Ratio) -> Tensor:
    """``x`` (..., channels) times the ratio."""
    return x * factors(ratio, x.device).to(x.dtype) if ratio else x
