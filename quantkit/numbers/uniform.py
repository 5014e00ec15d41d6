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
from quantkit.numbers.minifloat import E4M3
from quantkit.numbers.quantizer import Codes, Quantizer
from quantkit.numbers.ratios import Ratio, divided, factors, multiplied
from quantkit.numbers.scales import ScaleGrid, exact_power


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, low: float, high: float) -> Tensor:
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


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, low: float, high: float) -> Tensor:
    """``dequantize(quantize(x))`` with straight-through gradients (Bengio et al., arXiv 1308.3432)."""
    return _StraightThrough.apply(x, scale, zero_point, low, high)


@dataclass(frozen=True)
class QuantizedWeight(Quantizer):
    """A layer's weight as it ships: int8 ``codes`` in the weight's shape, ``scale`` (O, groups) float32,
    ``zero_point`` (O, groups) int8 or None, and the format they obey. With a ``ratio``, that of the range by which its
    input is read, the codes are those of the weight times the ratio of each input: what they stand for is divided by
    it. ``in_fp8``: products of codes and scales are rounded to E4M3, as kernels do that multiply them with FP8
    activations (FireQ, llm-fireq/fireq).
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    format: WeightFormat
    ratio: Ratio = ()
    in_fp8: bool = False

    kind: ClassVar[str] = "weight"
    stored: ClassVar[Literal[True]] = True
    static: ClassVar[Literal[True]] = True
    scaled: ClassVar[Literal[True]] = True
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
        return self.scale.unsqueeze(-1) * self.columns(), zero.unsqueeze(-1)

    def columns(self) -> Tensor:
        """What scales are multiplied by for each input, (groups, inputs of a group)."""
        if not self.ratio:
            return self.scale.new_ones(1, 1)
        return factors(self.ratio, self.scale.device).reciprocal().reshape(self.scale.shape[1], -1)

    def with_scale(self, scale: Tensor) -> QuantizedWeight:
        """The same codes under the scales nearest to these that the format stores."""
        return replace(self, scale=ScaleGrid.of(scale, self.format).nearest(scale))

    def steps(self) -> Tensor:
        """The distance between neighbouring values, in the weight's shape."""
        rows = self.codes.reshape(*self.scale.shape, -1)
        return self.grid()[0].expand(rows.shape).reshape(self.codes.shape)

    def quantize(self, x: Tensor) -> Codes:
        """The nearest codes of another weight of this shape, on the grid of this one."""
        codes = quantize(x.reshape(*self.scale.shape, -1), *self.grid(), *self.format.code_range)
        return Codes(codes.reshape(x.shape).to(torch.int8), self.scale)

    def dequantize(self, codes: Codes | None = None) -> Tensor:
        """The float32 weight that codes on this grid stand for, by default its own, in the weight's shape."""
        found = self.codes if codes is None else codes.codes
        values = dequantize(found.reshape(*self.scale.shape, -1).float(), *self.grid()).reshape(found.shape)
        if not self.in_fp8:
            return values
        power = 2.0 ** (exact_power(self.scale) or 0)  # that of the whole tensor, which the result is divided by
        return E4M3.nearest(values * power) / power

    def fake_quantize(self, x: Tensor) -> Tensor:
        grouped = x.reshape(*self.scale.shape, -1)
        return fake_quantize(grouped, *self.grid(), *self.format.code_range).reshape(x.shape)

    def to_dict(self) -> dict[str, Any]:
        """Tensors under their names, the zero points None where there are none."""
        held = {name: value for name, value in super().to_dict().items() if name != "in_fp8"}
        return held | {"format": str(self.format)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> QuantizedWeight:
        format = Scheme.parse(record["format"]).weight
        assert format is not None, "written by to_dict"
        return cls(record["codes"], record["scale"], record.get("zero_point"), format, tuple(record.get("ratio", ())))

    def fingerprint(self) -> bytes:
        held = (self.codes, self.scale, self.zero_point)
        parts = b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in held if t is not None)
        return parts + repr(self.ratio).encode() if self.ratio else parts


@dataclass(frozen=True)
class SiteRange(Quantizer):
    """The quantizer of one site: unsigned codes of ``bits`` bits, one scale and zero point for the whole tensor. With
    a ``ratio``, codes are those of the tensor divided by the ratio of each channel.
    """

    scale: float
    zero_point: int
    bits: int = 8
    ratio: Ratio = ()

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
        return Codes(quantize(divided(x, self.ratio), scale, zero, 0, self.high), scale)

    def dequantize(self, codes: Codes) -> Tensor:
        return multiplied(dequantize(codes.codes, *self._grid(codes.codes.device)), self.ratio)

    def fake_quantize(self, x: Tensor) -> Tensor:
        found = fake_quantize(divided(x, self.ratio), *self._grid(x.device), 0, self.high)
        return multiplied(found, self.ratio)
