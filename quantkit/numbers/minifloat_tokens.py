"""Activations in FP8 with a scale for each token, found as it comes: max |x| / the largest number, so that nothing is
clipped (FireQ, llm-fireq/fireq).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from quantkit.formats import ActivationFormat
from quantkit.numbers.minifloat import MINIFLOATS
from quantkit.numbers.per_token import SMALLEST_STEP
from quantkit.numbers.quantizer import Codes, Quantizer


@dataclass(frozen=True)
class MinifloatTokens(Quantizer):
    """The quantizer of a site whose rows get a scale each and become numbers of ``fmt``."""

    fmt: str = "fp8"

    kind: ClassVar[str] = "minifloat-per-token"
    stored: ClassVar[Literal[False]] = False
    static: ClassVar[Literal[False]] = False
    integer: ClassVar[Literal[False]] = False
    clips: ClassVar[bool] = False

    @property
    def format(self) -> ActivationFormat:
        return ActivationFormat(self.fmt, dynamic=True)

    @property
    def bits(self) -> int:
        return self.format.bits

    def _scales(self, x: Tensor) -> Tensor:
        largest = MINIFLOATS[self.fmt].largest
        return (x.detach().abs().amax(-1, keepdim=True) / largest).clamp(min=SMALLEST_STEP)

    def steps(self, x: Tensor) -> Tensor:
        """The distance between neighbouring values around each element of ``x``."""
        numbers, scale = MINIFLOATS[self.fmt], self._scales(x)
        power = torch.frexp(x / scale).exponent.clamp(min=numbers.lowest_power + 1) - 1 - numbers.mantissa
        return torch.exp2(power.to(x.dtype)) * scale

    def quantize(self, x: Tensor) -> Codes:
        """The numbers themselves, and the scale of each row."""
        scale = self._scales(x)
        return Codes(MINIFLOATS[self.fmt].nearest(x / scale), scale)

    def dequantize(self, codes: Codes) -> Tensor:
        return codes.codes * codes.scale
