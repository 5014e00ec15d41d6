"""A weight as it is kept: codes at their true width, scales in their own type, zero points at the codes' width.

The tensors of a weight in a safetensors file, under a name of the caller's (``<layer>.weight``):

- ``.codes`` uint8, bit planes of the codes as in ``numbers.packing``; of floating-point numbers, their bits;
- ``.scale`` float32, float16, float8_e4m3fn or int8 (``sf16``, ``sf8``, ``si8``), output channels x groups; of
  ``mxfp4`` the exponents around 127 as uint8;
- ``.shared_scale`` what those of ``sf8`` are multiplied by, one float32 number, or those of ``si8``, bfloat16, output
  channels x 1;
- ``.zero_point`` uint8, bit planes of the channels x groups zero points, where the format has them.

A weight stored as float16 (``w16``) is one tensor, ``.values``, in the weight's shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import CorruptFile, InvalidRequest
from quantkit.formats import WeightFormat
from quantkit.numbers.half import HalfWeight
from quantkit.numbers.kinds import AnyWeight
from quantkit.numbers.minifloat_weight import MinifloatWeight
from quantkit.numbers.packing import pack, pack_plane, unpack, unpack_plane
from quantkit.numbers.scales import E8M0, SCALE_TYPES, SHARED, channel_unit, exact_power, exponents, of_exponents
from quantkit.numbers.uniform import QuantizedWeight

PARTS = ("codes", "scale", "shared_scale", "zero_point", "values")


@dataclass(frozen=True)
class PackedWeight:
    """``codes``, ``scale``, ``zero_point`` and ``shared_scale`` as in the file; ``shape`` is the weight's."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    shape: tuple[int, ...]
    format: WeightFormat
    shared_scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held, counted from the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors("").values())

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What a safetensors file holds of this weight."""
        found = {"codes": self.codes, "scale": self.scale, "zero_point": self.zero_point}
        found["shared_scale"] = self.shared_scale
        return {f"{name}.{part}": tensor for part, tensor in found.items() if tensor is not None}

    @classmethod
    def of_tensors(
        cls, tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], format: WeightFormat
    ) -> PackedWeight:
        """The weight ``tensors`` wrote. Raises CorruptFile where a tensor is missing or of another type."""
        codes, scale, zero = (tensors.get(f"{name}.{part}") for part in ("codes", "scale", "zero_point"))
        shared = tensors.get(f"{name}.shared_scale")
        lacking = (zero is None) == format.zero_point or (shared is None) == (format.scale in SHARED)
        if codes is None or scale is None or lacking:
            raise CorruptFile(f"The codes, scales or zero points of {name!r} ({format}) are missing.")
        if codes.dtype != torch.uint8 or scale.dtype != SCALE_TYPES[format.scale]:
            raise CorruptFile(
                f"{name!r} has codes of {codes.dtype} and scales of {scale.dtype}; {format} has codes of torch.uint8 "
                f"and scales of {SCALE_TYPES[format.scale]}."
            )
        return cls(codes, scale, zero, tuple(shape), format, shared)


def pack_weight(weight: QuantizedWeight | MinifloatWeight) -> PackedWeight:
    """Pack a weight. Raises InvalidRequest for scales that their type cannot hold exactly."""
    bits, (scale, shared) = weight.format.bits, packed_scale(weight)
    shape = tuple(weight.codes.shape)
    if not weight.integer:
        codes = pack_plane(weight.codes.reshape(-1), bits)
        return PackedWeight(codes, scale.contiguous(), None, shape, weight.format, shared)
    zero = None if weight.zero_point is None else pack(weight.zero_point, bits)
    return PackedWeight(pack(weight.codes, bits), scale.contiguous(), zero, shape, weight.format, shared)


def packed_scale(weight: QuantizedWeight | MinifloatWeight) -> tuple[Tensor, Tensor | None]:
    """The scales in their own type, and what they are multiplied by. Raises InvalidRequest for scales that their type
    cannot hold exactly.
    """
    kind, shared = weight.format.scale, None
    if kind == E8M0:
        return exponents(weight.scale), None
    if kind == "f8":
        shared = torch.tensor(2.0 ** -(exact_power(weight.scale) or 0), dtype=torch.float32, device="cpu")
    elif kind == "i8":
        shared = channel_unit(weight.scale).to(torch.bfloat16)
    whole = 1.0 if shared is None else shared.float()
    scale = torch.round(weight.scale / whole) if kind == "i8" else weight.scale / whole
    scale = scale.to(SCALE_TYPES[kind])
    if not torch.equal(scale.float() * whole, weight.scale):
        raise InvalidRequest(
            f"The scales of {weight.format} are not {scale.dtype} numbers. Round them before the codes are computed."
        )
    return scale, shared


def unpack_weight(packed: PackedWeight) -> QuantizedWeight:
    """The codes, scales and zero points of a packed weight of integers, exactly."""
    bits, scale = packed.format.bits, packed.scale.float()
    scale = scale if packed.shared_scale is None else scale * packed.shared_scale.float()
    zero = None if packed.zero_point is None else unpack(packed.zero_point, bits, tuple(scale.shape))
    return QuantizedWeight(unpack(packed.codes, bits, packed.shape), scale, zero, packed.format)


def unpack_minifloats(packed: PackedWeight) -> MinifloatWeight:
    """The codes and scales of a packed weight of floating-point numbers, exactly."""
    bits, shape = packed.format.bits, packed.shape
    scale = of_exponents(packed.scale) if packed.format.scale == E8M0 else packed.scale.float()
    scale = scale if packed.shared_scale is None else scale * packed.shared_scale.float()
    return MinifloatWeight(unpack_plane(packed.codes, bits, math.prod(shape)).reshape(shape), scale, packed.format)


def stored_tensors(weight: AnyWeight, name: str) -> dict[str, Tensor]:
    """What a safetensors file holds of a weight of any kind."""
    return pack_weight(weight).tensors(name) if weight.scaled else {f"{name}.values": weight.values}


def stored_bytes(weight: AnyWeight) -> int:
    """The bytes of ``stored_tensors``."""
    return sum(tensor.nbytes for tensor in stored_tensors(weight, "").values())


def stored_weight(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], format: WeightFormat) -> AnyWeight:
    """The weight that ``stored_tensors`` took apart. Raises CorruptFile where a tensor is missing or of another
    type.
    """
    if not format.is_half:
        packed = PackedWeight.of_tensors(tensors, name, shape, format)
        return unpack_weight(packed) if format.is_integer else unpack_minifloats(packed)
    values = tensors.get(f"{name}.values")
    if values is None or values.dtype != torch.float16 or tuple(values.shape) != tuple(shape):
        found = "none" if values is None else f"{values.dtype} of shape {tuple(values.shape)}"
        raise CorruptFile(f"{name!r} ({format}) has values in torch.float16 of shape {tuple(shape)}; found: {found}.")
    return HalfWeight(values)
