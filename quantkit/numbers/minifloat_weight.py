"""Weights whose codes are floating-point numbers of 4 or 8 bits: FP8, NVFP4 and MXFP4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from quantkit.formats import Scheme, WeightFormat
from quantkit.numbers.minifloat import MINIFLOATS, Minifloat
from quantkit.numbers.quantizer import Codes, Quantizer


@dataclass(frozen=True)
class MinifloatWeight(Quantizer):
    """A layer's weight as it ships: the bits of its numbers as uint8 ``codes`` in the weight's shape, and ``scale``
    (O, groups) float32.
    """

    codes: Tensor
    scale: Tensor
    format: WeightFormat

    kind: ClassVar[str] = "minifloat"
    stored: ClassVar[Literal[True]] = True
    static: ClassVar[Literal[True]] = True
    integer: ClassVar[Literal[False]] = False
    scaled: ClassVar[Literal[True]] = True
    zero_point: ClassVar[None] = None

    @property
    def numbers(self) -> Minifloat:
        """What the codes are."""
        return MINIFLOATS[self.format.fmt]

    @property
    def bits(self) -> int:
        return self.format.bits

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    def on(self, device: torch.device | str) -> MinifloatWeight:
        """The same in the memory of a device."""
        return replace(self, codes=self.codes.to(device), scale=self.scale.to(device))

    def _grouped(self, x: Tensor) -> Tensor:
        return x.reshape(*self.scale.shape, -1)

    def steps(self) -> Tensor:
        """The distance between neighbouring values at each of them, in the weight's shape."""
        numbers, codes = self.numbers, self.numbers.decode(self.codes)
        power = torch.frexp(codes).exponent.clamp(min=numbers.lowest_power + 1) - 1 - numbers.mantissa
        return (self._grouped(torch.exp2(power.float())) * self.scale.unsqueeze(-1)).reshape(self.shape)

    def quantize(self, x: Tensor) -> Codes:
        """The nearest codes of another weight of this shape, under the scales of this one."""
        numbers = self.numbers.nearest(self._grouped(x) / self.scale.unsqueeze(-1))
        return Codes(self.numbers.encode(numbers).reshape(x.shape).to(x.device), self.scale)

    def dequantize(self, codes: Codes | None = None) -> Tensor:
        """The float32 weight that codes under these scales stand for, by default its own, in the weight's shape."""
        found = self.codes if codes is None else codes.codes
        return (self._grouped(self.numbers.decode(found)) * self.scale.unsqueeze(-1)).reshape(found.shape)

    def inside(self, x: Tensor) -> Tensor:
        largest = self.numbers.largest + self.numbers.largest / (1 << self.numbers.mantissa + 2)
        return (self._grouped(x) / self.scale.unsqueeze(-1)).abs().le(largest).reshape(x.shape)

    def to_dict(self) -> dict[str, Any]:
        """Tensors under their names."""
        return super().to_dict() | {"format": str(self.format)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> MinifloatWeight:
        format = Scheme.parse(record["format"]).weight
        assert format is not None, "written by to_dict"
        return cls(record["codes"], record["scale"], format)

    def fingerprint(self) -> bytes:
        return b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in (self.codes, self.scale))
