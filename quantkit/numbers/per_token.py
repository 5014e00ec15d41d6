"""Codes of activations that get a scale for each token as they come: no range has to be known before.

A token is a row of a tensor's last dimension. Its codes are signed and symmetric, the largest magnitude of the row is
the top code: scale = max |x| / (2^(bits - 1) - 1), code = round(x / scale), which needs no clipping.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.numbers.logarithmic import LogRange
from quantkit.numbers.uniform import SiteRange

SMALLEST_STEP = torch.finfo(torch.float32).tiny  # rows of zeros need one too


class _StraightThroughRows(torch.autograd.Function):
    """Fake quantization whose gradient is 1: nothing is clipped."""

    @staticmethod
    def forward(ctx, x, found):
        scale = found.scales(x)
        return torch.round(x / scale).mul_(scale)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


@dataclass(frozen=True)
class TokenRange:
    """The quantizer of a site that finds a scale for every row by itself; codes of ``bits`` bits."""

    bits: int = 8

    @property
    def high(self) -> int:
        """The top code, that of the largest magnitude in a row."""
        return (1 << self.bits - 1) - 1

    def scales(self, x: Tensor) -> Tensor:
        """The scale of every row of ``x``, with a last dimension of one."""
        return (x.detach().abs().amax(-1, keepdim=True) / self.high).clamp(min=SMALLEST_STEP)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """``x`` as the runtime sees it, with straight-through gradients."""
        return _StraightThroughRows.apply(x, self)


AnyRange = SiteRange | LogRange | TokenRange


def range_of(record: Mapping[str, Any]) -> AnyRange:
    """The quantizer whose fields a file holds."""
    if "scale" not in record:
        return TokenRange(**record)
    return SiteRange(**record) if "zero_point" in record else LogRange(**record)
