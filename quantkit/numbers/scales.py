"""Scales of groups in fewer bits than float32: what a format stores is what codes are computed with.

``sf16`` are float16 numbers. ``sf8`` are E4M3 numbers under a power of two for the whole tensor, which keeps small
scales out of the subnormal range (FireQ, llm-fireq/fireq). ``si8`` are whole numbers up to 127 times one bfloat16
number for each output channel. docs/methods/number-formats.md has the formulas.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.errors import InvalidRequest
from quantkit.formats import WeightFormat

E4M3, LARGEST_E4M3, SMALLEST_E4M3, NORMAL_E4M3 = torch.float8_e4m3fn, 448.0, 2.0**-9, 2.0**-6
E8M0 = "e8m0"  # powers of two from 2^-127 to 2^127, stored as exponents around 127
SCALE_TYPES = {"f32": torch.float32, "f16": torch.float16, "f8": E4M3, "i8": torch.int8, E8M0: torch.uint8}
_SMALLEST = {"f16": 2.0**-24, "f8": SMALLEST_E4M3, E8M0: 2.0**-126}  # magnitudes above zero
_LARGEST = {"f16": torch.finfo(torch.float16).max, "f8": LARGEST_E4M3, "i8": 2.0**127, E8M0: 2.0**127}
SHARED = ("f8", "i8")  # types of which a large scale makes small ones coarse
BY_CHANNEL = ("i8",)
_TOP_I8 = 127
_MOST_POWERS = 126
_E8M0_BIAS = 127


@dataclass(frozen=True)
class ScaleGrid:
    """The numbers that the scales of one weight can be: those of a ``type``, divided by 2 to a ``power``; whole
    numbers times what is found for each row of scales.
    """

    type: str = "f32"
    power: int = 0

    @classmethod
    def of(cls, scale: Tensor, format: WeightFormat) -> ScaleGrid:
        """The grid for scales near these, of all groups of a weight. Raises InvalidRequest for scales beyond it."""
        if format.scale == "f32":
            return cls()
        if (largest := float(scale.abs().amax())) > _LARGEST[format.scale]:
            raise InvalidRequest(
                f"Scales of {format} end at {_LARGEST[format.scale]:g}, and a weight needs one of {largest:g}. Ask "
                f"for float32 scales, {replace(format, scale='f32')}, or leave its layer float."
            )
        if format.scale != "f8":
            return cls(format.scale)
        low, high = format.code_range
        return cls("f8", per_tensor_power(scale.abs(), high - low if format.zero_point else -low))

    def nearest(self, scale: Tensor) -> Tensor:
        """The nearest numbers of the grid, in the type of ``scale``; what would become zero or infinite is the
        smallest or the largest of them, so that values of codes stay finite.
        """
        if self.type == "f32":
            return scale
        if self.type == "i8":
            unit = channel_unit(scale)
            return torch.copysign(torch.round(scale.abs() / unit).clamp(1, _TOP_I8) * unit, scale)
        size = (scale.abs() * 2.0**self.power).clamp(_SMALLEST[self.type], _LARGEST[self.type])
        if self.type == E8M0:
            fraction, power = torch.frexp(size)
            return torch.copysign(torch.ldexp(torch.ones_like(size), power - (fraction < 0.5**0.5).int()), scale)
        return torch.copysign(size.to(SCALE_TYPES[self.type]).to(scale.dtype) / 2.0**self.power, scale)


def with_scales_of_others(scale: Tensor, live: Tensor) -> Tensor:
    """Scales with the smallest of those of ``live`` groups for the others, all of whose weights are zero: they must
    not decide on what is shared.
    """
    least = torch.where(live, scale.abs(), torch.full_like(scale, torch.inf)).amin()
    return torch.where(live | torch.isinf(least), scale, least)


def channel_unit(scale: Tensor) -> Tensor:
    """What the scales (..., groups) of a channel are multiples of, with a last dimension of one: the largest is 127
    times that. Of 8 bits in bfloat16, so that multiples are exact and have the same unit again.
    """
    return (scale.abs().amax(-1, keepdim=True) / _TOP_I8).to(torch.bfloat16).to(scale.dtype)


def per_tensor_power(scale: Tensor, top: float, floor: float = NORMAL_E4M3) -> int:
    """FireQ's exponent i of the power of two that scales are multiplied by: the one, among those that keep ``top``
    times a scale within 448, with the least underflow below ``floor``; the smallest of equals.

    FireQ's floor is the smallest number of E4M3. Above the smallest normal one scales, and their products with codes,
    keep all their bits (docs/methods/number-formats.md).
    """
    best, least = 0, float("inf")
    for power in range(_MOST_POWERS + 1):
        scaled = scale.double() * 2.0**power
        if (scaled * top > LARGEST_E4M3).any():
            break
        slack = float(((floor - scaled).clamp_min(0) / floor).sum())
        if slack < least:
            best, least = power, slack
        if not least:
            break
    return best


def exact_power(scale: Tensor) -> int | None:
    """The smallest power of two that makes E4M3 numbers of scales; None where none does. Any that does stands for the
    same values, products with codes that are rounded to E4M3 included.
    """
    for power in range(_MOST_POWERS + 1):
        stored = scale * 2.0**power
        if torch.equal(stored.to(E4M3).to(scale.dtype), stored):
            return power
    return None


def exponents(scale: Tensor) -> Tensor:
    """Powers of two as the bytes that E8M0 stores: their exponents around 127."""
    return (torch.frexp(scale).exponent - 1 + _E8M0_BIAS).to(torch.uint8)


def of_exponents(stored: Tensor) -> Tensor:
    """The float32 numbers of such bytes."""
    return torch.ldexp(torch.ones(stored.shape, device=stored.device), stored.int() - _E8M0_BIAS)
