"""Logarithmic codes of probabilities (RepQ-ViT, Li et al., arXiv 2212.08254, section 3.3; RepQuant, arXiv 2402.05628).

A probability p is coded by k = round(-2 log2(p / scale)): steps of the square root of two. The top code is kept for
zero, so that b bits hold 2^b - 1 powers and zero. What the codes stand for, scale * 2^(-k/2), is computed in powers of
two alone, with a scale that depends on whether k is even: scale * 2^(-k/2) for even k and scale * sqrt(2) *
2^(-(k+1)/2) for odd k. A product with integer codes then needs two accumulators and shifts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from quantkit.formats import ActivationFormat
from quantkit.numbers.quantizer import Codes, Quantizer


@dataclass(frozen=True)
class LogRange(Quantizer):
    """The quantizer of a site that holds probabilities; the largest value it can represent is ``scale``."""

    scale: float
    bits: int = 4

    kind: ClassVar[str] = "logarithmic"
    stored: ClassVar[Literal[False]] = False
    static: ClassVar[Literal[True]] = True
    integer: ClassVar[Literal[False]] = False

    @property
    def format(self) -> ActivationFormat:
        return ActivationFormat(f"log{self.bits}")

    @property
    def high(self) -> int:
        """The top code, which stands for zero."""
        return (1 << self.bits) - 1

    def quantize(self, x: Tensor) -> Codes:
        """Codes of ``x`` as floats; half a step under the last power and lower it is zero."""
        k = torch.round(-2 * torch.log2(x.clamp(min=0) / self.scale))  # log2(0) is minus infinity, and k infinite
        return Codes(k.clamp(0, self.high), k.new_tensor(self.scale))

    def dequantize(self, codes: Codes) -> Tensor:
        return self.values(codes.codes)

    def inside(self, x: Tensor) -> Tensor:
        return (x >= 0) & (x <= self.scale * 2**0.25)

    def values(self, codes: Tensor) -> Tensor:
        """What codes stand for, in powers of two and a scale for odd and for even codes."""
        even, odd = codes.new_tensor(self.scale), codes.new_tensor(self.scale * math.sqrt(2))
        scale = torch.where(codes.remainder(2) == 0, even, odd)
        return torch.where(codes == self.high, torch.zeros_like(codes), scale * torch.exp2(-torch.ceil(codes / 2)))

    def table(self) -> Tensor:
        """The value of every code, in float32."""
        return self.values(torch.arange(self.high + 1, dtype=torch.float32, device="cpu"))
