"""Floating-point numbers of 4 and 8 bits: what their bits stand for, and rounding to them.

E4M3 and E5M2 are those of Micikevicius et al. (arXiv 2209.05433), E2M1 is that of the OCP Microscaling Formats
specification (version 1.0). Values beyond the largest number saturate; there is neither infinity nor NaN here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Minifloat:
    """Numbers of a sign, ``exponent`` and ``mantissa`` bits, up to ``largest``."""

    exponent: int
    mantissa: int
    largest: float

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def lowest_power(self) -> int:
        """Of the smallest normal number, and of all that are smaller."""
        return 2 - (1 << self.exponent - 1)

    @cached_property
    def magnitudes(self) -> Tensor:
        """The numbers without a sign, in the order of their codes, float32."""
        codes = torch.arange(1 << self.exponent + self.mantissa, device="cpu")
        power, fraction = codes >> self.mantissa, (codes & ((1 << self.mantissa) - 1)) / (1 << self.mantissa)
        values = torch.ldexp((power > 0) + fraction, power.clamp(min=1) - 1 + self.lowest_power)
        return values[values <= self.largest]

    def nearest(self, x: Tensor) -> Tensor:
        """The number nearest to each element, ties to the even one, in the type of ``x``."""
        power = torch.frexp(x).exponent.clamp(min=self.lowest_power + 1) - 1
        step = torch.exp2((power - self.mantissa).to(x.dtype))
        return (torch.round(x / step) * step).clamp(-self.largest, self.largest)

    def encode(self, numbers: Tensor) -> Tensor:
        """The bits of numbers of this kind, as uint8."""
        place = torch.searchsorted(self.magnitudes, numbers.detach().cpu().float().abs())
        return (place | ((numbers.cpu() < 0).long() << self.bits - 1)).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """The float32 numbers of such bits."""
        table = torch.cat([self.magnitudes, torch.zeros(1 << self.bits - 1, device="cpu")])[: 1 << self.bits - 1]
        return torch.cat([table, -table]).to(codes.device)[codes.long()]


E4M3, E5M2, E2M1 = Minifloat(4, 3, 448.0), Minifloat(5, 2, 57344.0), Minifloat(2, 1, 6.0)
MINIFLOATS = {"fp8": E4M3, "fp8e5m2": E5M2, "nvfp4": E2M1, "mxfp4": E2M1}  # by the formats whose numbers they are
