"""The definition of the integer codes: quantize, dequantize and their straight-through composition.

Rounding is half to even and codes saturate, as onnxruntime's QuantizeLinear does. Everything that simulates,
packs, exports or executes codes is checked against these few lines.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.formats import WeightFormat


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """Codes of ``x`` as floats: round(x / scale) + zero_point, clamped to [low, high]. Shapes broadcast."""
    return (torch.round(x / scale) + zero_point).clamp(low, high)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Values of codes: (codes - zero_point) * scale."""
    return (codes - zero_point) * scale


class _StraightThrough(torch.autograd.Function):
    """Fake quantization whose gradient is 1 inside the representable range and 0 where the value was clipped."""

    @staticmethod
    def forward(ctx, x, scale, zero_point, low, high):
        ctx.save_for_backward(x, scale, zero_point)
        ctx.range = (low, high)
        # ``dequantize`` in place: activations are large, and are quantized while others of their size are held
        return quantize(x, scale, zero_point, low, high).sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx, gradient):
        x, scale, zero_point = ctx.saved_tensors
        low, high = ctx.range
        code = x / scale + zero_point
        inside = (code >= low - 0.5) & (code <= high + 0.5)
        return gradient * inside, None, None, None, None


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """``dequantize(quantize(x))`` with straight-through gradients (Bengio et al., arXiv 1308.3432)."""
    return _StraightThrough.apply(x, scale, zero_point, low, high)


@dataclass(frozen=True)
class QuantizedWeight:
    """A layer's weight as it ships: int8 ``codes`` in the weight's shape, ``scale`` (O, groups) float32,
    ``zero_point`` (O, groups) int8 or None, and the format they obey."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    format: WeightFormat

    def dequantize(self) -> Tensor:
        """The float32 weight these codes stand for, in the weight's shape."""
        grouped = self.codes.reshape(*self.scale.shape, -1).float()
        zero = torch.zeros_like(self.scale) if self.zero_point is None else self.zero_point.float()
        return dequantize(grouped, self.scale.unsqueeze(-1), zero.unsqueeze(-1)).reshape(self.codes.shape)


@dataclass(frozen=True)
class SiteRange:
    """The quantizer of one site: unsigned codes of ``bits`` bits, one scale and zero point for the whole tensor."""

    scale: float
    zero_point: int
    bits: int = 8

    @property
    def high(self) -> int:
        return (1 << self.bits) - 1

    def fake_quantize(self, x: Tensor) -> Tensor:
        """``x`` as the integer runtime sees it, with straight-through gradients."""
        scale = torch.tensor(self.scale, dtype=torch.float32, device=x.device)
        zero = torch.tensor(float(self.zero_point), device=x.device)
        return fake_quantize(x, scale, zero, 0, self.high)
