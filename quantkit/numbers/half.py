"""Numbers stored as float16: values rounded to half precision, computed with in float32. There are no codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from quantkit.errors import InvalidRequest
from quantkit.formats import HALF, WeightFormat
from quantkit.numbers.quantizer import Codes, Quantizer

LEAST_ELEMENTS = 64  # of a tensor: the Cast that widens it takes about as much of a file as half of these
LARGEST = torch.finfo(torch.float16).max  # 65504
_STEPS = torch.finfo(torch.float16).eps  # from one power of two to the next, in that power
_EVEN = torch.finfo(torch.float16).tiny  # below it numbers are evenly spaced


def half_problem(weight: Tensor) -> str:
    """Why float16 cannot hold a weight; empty where it can. What is smaller than its numbers just rounds."""
    low, high = weight.detach().aminmax()
    largest = float(torch.maximum(-low, high))
    return f"its weight reaches {largest:g}, and float16 ends at {LARGEST:g}" if largest > LARGEST else ""


def is_half_exactly(tensor: Tensor) -> bool:
    """Whether a float32 tensor can be stored as float16 without loss, and is worth it."""
    worth = tensor.dtype == torch.float32 and tensor.numel() >= LEAST_ELEMENTS
    return worth and torch.equal(tensor.to(torch.float16).float(), tensor)


@dataclass(frozen=True)
class HalfWeight(Quantizer):
    """A layer's weight as it ships in float16: ``values`` in the weight's shape."""

    values: Tensor

    kind: ClassVar[str] = "float16"
    stored: ClassVar[Literal[True]] = True
    static: ClassVar[Literal[True]] = True
    scaled: ClassVar[Literal[False]] = False
    integer: ClassVar[Literal[False]] = False
    clips: ClassVar[bool] = False

    @classmethod
    def of(cls, weight: Tensor) -> HalfWeight:
        """The nearest values, ties to even, on the CPU, where what is stored stays. Raises InvalidRequest for a weight
        that is beyond float16.
        """
        if problem := half_problem(weight):
            raise InvalidRequest(f"A weight cannot be stored as float16: {problem}.")
        return cls(weight.detach().cpu().to(torch.float16))

    @property
    def format(self) -> WeightFormat:
        return WeightFormat(HALF)

    @property
    def bits(self) -> int:
        return self.format.bits

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def on(self, device: torch.device | str) -> HalfWeight:
        """The same in the memory of a device."""
        return replace(self, values=self.values.to(device))

    def steps(self) -> Tensor:
        """The distance between neighbouring numbers at each value."""
        powers = torch.frexp(self.dequantize().abs().clamp(min=_EVEN)).exponent - 1
        return torch.exp2(powers.float()) * _STEPS

    def quantize(self, x: Tensor) -> Codes:
        """The nearest values of another weight, which are their own codes."""
        return Codes(x.to(torch.float16), torch.ones((), device=x.device))

    def dequantize(self, codes: Codes | None = None) -> Tensor:
        """The float32 weight of these values, by default its own."""
        return (self.values if codes is None else codes.codes).float()

    def to_dict(self) -> dict[str, Any]:
        """The values under their name."""
        return super().to_dict() | {"format": str(self.format)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> HalfWeight:
        return cls(record["values"])

    def fingerprint(self) -> bytes:
        return self.values.contiguous().view(torch.uint8).numpy().tobytes()
