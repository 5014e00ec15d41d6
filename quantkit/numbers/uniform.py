"""The definition of the integer codes: quantize, dequantize and their straight-through composition.

Rounding is half to even and codes saturate, as onnxruntime's QuantizeLinear does. Everything that simulates,
packs, exports or executes codes is checked against these few lines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from quantkit.formats import ActivationFormat, Scheme, WeightFormat
from quantkit.numbers.quantizer import Codes, Quantizer
from quantkit.numbers.scales import ScaleGrid


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
class QuantizedWeight(Quantizer):
    """A layer's weight as it ships: int8 ``codes`` in the weight's shape, ``scale`` (O, groups) float32,
    ``zero_point`` (O, groups) int8 or None, and the format they obey."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    format: WeightFormat

    kind: ClassVar[str] = "weight"
    stored: ClassVar[Literal[True]] = True
    static: ClassVar[Literal[True]] = True
    integer: ClassVar[Literal[True]] = True

    @property
    def bits(self) -> int:
        return self.format.bits

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    def on(self, device: torch.device | str) -> QuantizedWeight:
        """The same in the memory of a device."""
        zero = None if self.zero_point is None else self.zero_point.to(device)
        return replace(self, codes=self.codes.to(device), scale=self.scale.to(device), zero_point=zero)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, to be broadcast over (O, groups, inputs of a group)."""
        zero = torch.zeros_like(self.scale) if self.zero_point is None else self.zero_point.float()
        return self.scale.unsqueeze(-1), zero.unsqueeze(-1)

    def with_scale(self, scale: Tensor) -> QuantizedWeight:
        """The same codes under the scales nearest to these that the format stores."""
        return replace(self, scale=ScaleGrid.of(scale, self.format).nearest(scale))

    def steps(self) -> Tensor:
        """The distance between neighbouring values, in the weight's shape."""
        rows = self.codes.reshape(*self.scale.shape, -1)
        return self.scale.unsqueeze(-1).expand(rows.shape).reshape(self.codes.shape)

    def quantize(self, x: Tensor) -> Codes:
        """The nearest codes of another weight of this shape, on the grid of this one."""
        codes = quantize(x.reshape(*self.scale.shape, -1), *self.grid(), *self.format.code_range)
        return Codes(codes.reshape(x.shape).to(torch.int8), self.scale)

    def dequantize(self, codes: Codes | None = None) -> Tensor:
        """The float32 weight that codes on this grid stand for, by default its own, in the weight's shape."""
        found = self.codes if codes is None else codes.codes
        return dequantize(found.reshape(*self.scale.shape, -1).float(), *self.grid()).reshape(found.shape)

    def fake_quantize(self, x: Tensor) -> Tensor:
        grouped = x.reshape(*self.scale.shape, -1)
        return fake_quantize(grouped, *self.grid(), *self.format.code_range).reshape(x.shape)

    def to_dict(self) -> dict[str, Any]:
        """Tensors under their names, the zero points None where there are none."""
        return super().to_dict() | {"format": str(self.format)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> QuantizedWeight:
        format = Scheme.parse(record["format"]).weight
        assert format is not None, "written by to_dict"
        return cls(record["codes"], record["scale"], record.get("zero_point"), format)

    def fingerprint(self) -> bytes:
        held = (self.codes, self.scale, self.zero_point)
        return b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in held if t is not None)


@dataclass(frozen=True)
class SiteRange(Quantizer):
    """The quantizer of one site: unsigned codes of ``bits`` bits, one scale and zero point for the whole tensor."""

    scale: float
    zero_point: int
    bits: int = 8

    kind: ClassVar[str] = "uniform"
    stored: ClassVar[Literal[False]] = False
    static: ClassVar[Literal[True]] = True
    integer: ClassVar[Literal[True]] = True

    @property
    def format(self) -> ActivationFormat:
        return ActivationFormat(str(self.bits))

    @property
    def high(self) -> int:
        return (1 << self.bits) - 1

    def _grid(self, device: torch.device) -> tuple[Tensor, Tensor]:
        scale = torch.tensor(self.scale, dtype=torch.float32, device=device)
        return scale, torch.tensor(float(self.zero_point), dtype=torch.float32, device=device)

    def quantize(self, x: Tensor) -> Codes:
        scale, zero = self._grid(x.device)
        return Codes(quantize(x, scale, zero, 0, self.high), scale)

    def dequantize(self, codes: Codes) -> Tensor:
        return dequantize(codes.codes, *self._grid(codes.codes.device))

    def fake_quantize(self, x: Tensor) -> Tensor:
        return fake_quantize(x, *self._grid(x.device), 0, self.high)
