"""Number formats and schemes: the one place that parses, prints and counts them. Pure arithmetic.

A *scheme* says how one layer computes: its weight format and its input's format, written as the field does::

    scheme = "float" | weight | weight act | act
    weight = "w" fmt [ "g" int ] [ "z" ] [ "sf32" | "sf16" | "sf8" | "si8" ]
    act    = "a" fmt [ "d" ] [ "g" int ]
    fmt    = "2".."8" | "16" | "fp8" | "fp8e5m2" | "nvfp4" | "mxfp4" | "log4"

``16`` are float16 numbers: values, no codes, so that a weight of them has neither groups nor zero points nor scales.
Numbers of ``fp8`` (E4M3), ``fp8e5m2`` and 4 bits (E2M1) have no zero points. ``nvfp4`` are blocks of 16 with E4M3
scales, ``mxfp4`` blocks of 32 with powers of two.
``si8`` are scales of 8-bit integers with one factor for each output channel, in bfloat16.
Scales of integers in groups are float16 numbers, all others float32 ones, unless others are asked for.

>>> str(Scheme.parse("w4g64za8d"))
'w4g64za8d'
>>> Scheme.parse("w3a8").weight.storage_bytes((16, 3, 3, 3))   # 432 codes of 3 bits in planes, 16 float32 scales
226
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from quantkit.errors import InvalidRequest

EIGHT_BITS = 8
HALF = "16"
_FLOAT_BITS = {HALF: 16, "fp8": 8, "fp8e5m2": 8, "nvfp4": 4, "mxfp4": 4, "log4": 4}
_LARGEST = {"fp8": 448.0, "fp8e5m2": 57344.0, "nvfp4": 6.0, "mxfp4": 6.0}
BLOCKS = {"nvfp4": (16, "f8"), "mxfp4": (32, "e8m0")}  # group and scales that are a part of the format
SCALE_BYTES = {"f32": 4, "f16": 2, "f8": 1, "i8": 1, "e8m0": 1}
_TENSOR_BYTES, _CHANNEL_BYTES = {"f8": 4}, {"i8": 2}  # of what all scales of a weight, or of a channel, share
_FMT = r"(?:fp8e5m2|fp8|nvfp4|mxfp4|log4|16|[2-8])"
_WEIGHT = rf"w(?P<wfmt>{_FMT})(?:g(?P<wgroup>[1-9]\d*))?(?P<zero>z)?(?:s(?P<scale>f32|f16|f8|i8))?"
_ACT = rf"a(?P<afmt>{_FMT})(?P<dynamic>d)?(?:g(?P<agroup>[1-9]\d*))?"
_SCHEME = re.compile(rf"(?:{_WEIGHT})?(?:{_ACT})?")


def bit_planes(bits: int) -> tuple[int, ...]:
    """How codes of ``bits`` bits are stored: planes of 8, 4, 2 and 1 bits, high bits first. 3 -> (2, 1), 5 -> (4, 1),
    6 -> (4, 2).
    """
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of ``count`` codes of ``bits`` bits, each plane padded to a whole byte."""
    whole, rest = divmod(bits, 8)
    return count * whole + sum(math.ceil(count * plane / 8) for plane in bit_planes(rest))


@dataclass(frozen=True)
class _Format:
    """Numbers of one kind."""

    fmt: str

    @property
    def bits(self) -> int:
        return _FLOAT_BITS.get(self.fmt) or int(self.fmt)

    @property
    def is_integer(self) -> bool:
        return self.fmt not in _FLOAT_BITS

    @property
    def is_fp8(self) -> bool:
        """Whether these are floating-point numbers of 8 bits."""
        return self.fmt in ("fp8", "fp8e5m2")


@dataclass(frozen=True)
class WeightFormat(_Format):
    """How a layer's weight is stored. ``group`` 0 is one scale per output channel, n is one per n inputs of a
    channel. ``scale`` is their type; left empty, it is the usual one.
    """

    group: int = 0
    zero_point: bool = False
    scale: str = ""

    def __post_init__(self) -> None:
        group, scale = BLOCKS.get(self.fmt, (self.group, self.scale or self.usual_scale))
        object.__setattr__(self, "group", group)
        object.__setattr__(self, "scale", scale)

    @property
    def usual_scale(self) -> str:
        """The type of scales that a format has where none is named."""
        return "f16" if self.group and self.is_integer else "f32"

    @property
    def is_half(self) -> bool:
        """Whether the weight is stored as float16, in which nothing is a code."""
        return self.fmt == HALF

    @property
    def code_range(self) -> tuple[float, float]:
        """Smallest and largest code, e.g. (-8, 7) for 4 bits; with zero points too (they are signed codes)."""
        if self.fmt in _LARGEST:
            return -_LARGEST[self.fmt], _LARGEST[self.fmt]
        return -(1 << self.bits - 1), (1 << self.bits - 1) - 1

    def scale_count(self, shape: Sequence[int]) -> int:
        """Number of scales of a weight of this shape (output channels first)."""
        if self.is_half:
            return 0
        inputs = math.prod(shape[1:])
        return shape[0] * (inputs // self.group if self.group else 1)

    def storage_bytes(self, shape: Sequence[int]) -> int:
        """Packed bytes of a weight of this shape: codes, scales and zero points (a zero point has the codes'
        width).
        """
        scales = self.scale_count(shape)
        zeros = packed_bytes(scales, self.bits) if self.zero_point else 0
        shared = _TENSOR_BYTES.get(self.scale, 0) + shape[0] * _CHANNEL_BYTES.get(self.scale, 0)
        return packed_bytes(math.prod(shape), self.bits) + scales * SCALE_BYTES[self.scale] + shared + zeros

    def __str__(self) -> str:
        if self.fmt in BLOCKS:
            return f"w{self.fmt}"
        group = f"g{self.group}" if self.group else ""
        scale = "" if self.scale == self.usual_scale else f"s{self.scale}"
        return f"w{self.fmt}{group}{'z' if self.zero_point else ''}{scale}"


@dataclass(frozen=True)
class ActivationFormat(_Format):
    """How a site's tensor is quantized: static per tensor, or ``dynamic`` per token (``group`` n: per n channels)."""

    dynamic: bool = False
    group: int = 0

    def __str__(self) -> str:
        group = f"g{self.group}" if self.group else ""
        return f"a{self.fmt}{'d' if self.dynamic else ''}{group}"


@dataclass(frozen=True)
class Scheme:
    """A weight format and an activation format; either may be absent, both absent is ``float``."""

    weight: WeightFormat | None = None
    activation: ActivationFormat | None = None

    @classmethod
    def parse(cls, text: str | Scheme) -> Scheme:
        """Read a scheme; raises InvalidRequest naming the part that does not fit the grammar."""
        if isinstance(text, Scheme):
            return text
        if not isinstance(text, str):
            raise InvalidRequest(f"A scheme is text such as 'w4a8' or 'float', not {type(text).__name__}.")
        word = text.strip().lower()
        if word == "float":
            return cls()
        match = _SCHEME.fullmatch(word)
        if match is None or not word:
            raise InvalidRequest(
                f"Unknown scheme {text!r}. Expected 'float' or formats such as 'w4a8', 'w4g64za8d' or 'w8': "
                "w or a, then 2 to 8, 16, fp8, fp8e5m2, nvfp4, mxfp4 or log4, then g<group>, z, sf32, sf16, sf8 or "
                "si8, d."
            )
        part = match.groupdict()
        _require_parts(text, part)
        weight = activation = None
        if part["wfmt"]:
            weight = WeightFormat(part["wfmt"], int(part["wgroup"] or 0), bool(part["zero"]), part["scale"] or "")
        if part["afmt"]:
            activation = ActivationFormat(part["afmt"], bool(part["dynamic"]), int(part["agroup"] or 0))
        return cls(weight, activation)

    @property
    def is_float(self) -> bool:
        return self.weight is None and self.activation is None

    @property
    def has_codes(self) -> bool:
        """Whether some of it is codes: nothing is in a float layer, nor in one whose weight is stored as float16."""
        return self.activation is not None or (self.weight is not None and not self.weight.is_half)

    def with_activation(self, activation: ActivationFormat | None) -> Scheme:
        return replace(self, activation=activation)

    def __str__(self) -> str:
        return "float" if self.is_float else f"{self.weight or ''}{self.activation or ''}"


def _require_parts(text: str, part: Mapping[str, str | None]) -> None:
    """Raise InvalidRequest for parts that a weight's numbers do not have."""
    fmt, own = part["wfmt"], part["wgroup"] or part["scale"]
    if fmt == HALF and (own or part["zero"]):
        raise InvalidRequest(
            f"The scheme {text!r} asks for groups, zero points or scales of float16 numbers, which have none. "
            "Ask for 'w16'."
        )
    if fmt in BLOCKS and own:
        raise InvalidRequest(
            f"The scheme {text!r} asks for groups or scales of {fmt}, whose blocks of {BLOCKS[fmt][0]} with their "
            f"scales are a part of the format. Ask for 'w{fmt}'."
        )
    if fmt in _FLOAT_BITS and part["zero"]:
        raise InvalidRequest(
            f"The scheme {text!r} asks for zero points of floating-point numbers, which have none. Ask for it "
            "without 'z'."
        )


def check_group(layer: str, weight: WeightFormat, shape: Sequence[int]) -> None:
    """Raise InvalidRequest, naming the nearest valid group, when a group does not divide the inputs of a channel."""
    inputs = math.prod(shape[1:])
    if weight.group and inputs % weight.group:
        valid = [g for g in range(1, inputs + 1) if inputs % g == 0]
        nearest = min(valid, key=lambda g: abs(g - weight.group))
        raise InvalidRequest(
            f"Group size {weight.group} of {weight} does not fit layer {layer!r}: its output channels read "
            f"{inputs} inputs each. The nearest group size that divides them is {nearest}."
        )
