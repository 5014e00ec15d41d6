"""Logarithmic codes of probabilities (RepQ-ViT, Li et al., arXiv 2212.08254, section 3.3; RepQuant, arXiv 2402.05628).

A probability p is coded by k = round(-2 log2(p / scale)): steps of the square root of two. The top code is kept for
zero, so that b bits hold 2^b - 1 powers and zero. What the codes stand for, scale * 2^(-k/2), is computed in powers of
two alone, with a scale that depends on whether k is even: scale * 2^(-k/2) for even k and scale * sqrt(2) *
2^(-(k+1)/2) for odd k. A product with integer codes then needs two accumulators and shifts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.numbers.uniform import SiteRange


class _StraightThroughLog(torch.autograd.Function):
    """Fake quantization whose gradient is 1 except above the scale, where values are clipped."""

    @staticmethod
    def forward(ctx, x, found):
        ctx.save_for_backward(x)
        ctx.scale = found.scale
        return found.values(found.codes(x))

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * ((x >= 0) & (x <= ctx.scale * 2**0.25)), None


@dataclass(frozen=True)
class LogRange:
    """The quantizer of a site that holds probabilities; the largest value it can represent is ``scale``."""

    scale: float
    bits: int = 4

    @property
    def high(self) -> int:
        """The top code, which stands for zero."""
        return (1 << self.bits) - 1

    def codes(self, x: Tensor) -> Tensor:
        """Codes of ``x`` as floats; half a step under the last power and lower it is zero."""
        k = torch.round(-2 * torch.log2(x.clamp(min=0) / self.scale))  # log2(0) is minus infinity, and k infinite
        return k.clamp(0, self.high)

    def values(self, codes: Tensor) -> Tensor:
        """What codes stand for, in powers of two and a scale for odd and for even codes."""
        even, odd = codes.new_tensor(self.scale), codes.new_tensor(self.scale * math.sqrt(2))
        scale = torch.where(codes.remainder(2) == 0, even, odd)
        return torch.where(codes == self.high, torch.zeros_like(codes), scale * torch.exp2(-torch.ceil(codes / 2)))

    def table(self) -> Tensor:
        """The value of every code, in float32."""
        return self.values(torch.arange(self.high + 1, dtype=torch.float32))

    def fake_quantize(self, x: Tensor) -> Tensor:
        """``x`` as the runtime sees it, with straight-through gradients."""
        return _StraightThroughLog.apply(x, self)


def log_times_integer(codes: Tensor, found: LogRange, others: Tensor, site: SiteRange) -> Tensor:
    """The product of probabilities (..., M, K) with activations (..., K, N) from the codes of both, in float64.

    This defines what a kernel for such codes computes: a shift for each power of two, one integer accumulator for even
    codes and one for odd ones, a float multiplication at the end.
    """
    k, centred = codes.long(), others.long() - site.zero_point
    most = found.high // 2
    shifted = torch.where(k == found.high, 0, 1 << (most - (k + 1) // 2).clamp(min=0))
    even = torch.where(k % 2 == 0, shifted, 0) @ centred
    odd = torch.where(k % 2 == 1, shifted, 0) @ centred
    return found.scale * site.scale * 2.0**-most * (even.double() + math.sqrt(2) * odd.double())
