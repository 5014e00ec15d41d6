"""Codes of activations that get a scale for each token as they come: no range has to be known before.

A token is a row of a tensor's last dimension. Its codes are signed and symmetric, the largest magnitude of the row is
the top code: scale = max |x| / (2^(bits - 1) - 1), code = round(x / scale), which needs no clipping.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from quantkit.formats import ActivationFormat
from quantkit.numbers.quantizer import Codes, Quantizer
from quantkit.numbers.ratios import Ratio, divided, multiplied

SMALLEST_STEP = torch.finfo(torch.float32).tiny  # rows of zeros need one too


@dataclass(frozen=True)
class TokenRange(Quantizer):
    """The quantizer of a site that finds a scale for every row by itself; codes of ``bits`` bits. With a ``ratio``,
    codes are those of rows divided by the ratio of each channel.
    """

    bits: int = 8
    ratio: Ratio = ()

    kind: ClassVar[str] = "per-token"
    stored: ClassVar[Literal[False]] = False
    static: ClassVar[Literal[False]] = False
    integer: ClassVar[Literal[True]] = True
    clips: ClassVar[bool] = False

    @property
    def format(self) -> ActivationFormat:
        return ActivationFormat(str(self.bits), dynamic=True)

    @property
    def high(self) -> int:
        """The top code, that of the largest magnitude in a row."""
        return (1 << self.bits - 1) - 1

    def steps(self, x: Tensor) -> Tensor:
        """The distance between neighbouring values: the scale of every row of ``x``, with a last dimension of one."""
        return (x.detach().abs().amax(-1, keepdim=True) / self.high).clamp(min=SMALLEST_STEP)

    def quantize(self, x: Tensor) -> Codes:
        x = divided(x, self.ratio)
        scale = self.steps(x)
        return Codes(torch.round(x / scale), scale)

    def dequantize(self, codes: Codes) -> Tensor:
        return multiplied(codes.codes * codes.scale, self.ratio)
