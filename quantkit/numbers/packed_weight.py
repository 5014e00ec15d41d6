"""A weight as it is kept: codes at their true width, scales in their own type, zero points at the codes' width.

The tensors of a weight in a safetensors file, under a name of the caller's (``<layer>.weight``):

- ``.codes`` uint8, bit planes of the codes as in ``kernels.packing``, in the order of the (permuted) weight;
- ``.scale`` float32, float16 or float8_e4m3fn (``sf16``, ``sf8``), output channels x groups;
- ``.zero_point`` uint8, bit planes of the channels x groups zero points, where the format has them;
- ``.order`` int32, where the inputs were permuted: input ``order[i]`` of the layer is input i of the codes, so that
  groups of inputs that were rounded together (act-order) lie side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import CorruptFile, InvalidRequest
from quantkit.formats import WeightFormat
from quantkit.numbers.packing import pack, unpack
from quantkit.numbers.uniform import QuantizedWeight

SCALE_TYPES = {"f32": torch.float32, "f16": torch.float16, "f8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class PackedWeight:
    """``codes``, ``scale``, ``zero_point`` and ``order`` as in the file; ``shape`` is the weight's."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    order: Tensor | None
    shape: tuple[int, ...]
    format: WeightFormat

    @property
    def nbytes(self) -> int:
        """Bytes held, counted from the tensors; the permutation, which a format does not promise, is not in it."""
        held = (self.codes, self.scale) if self.zero_point is None else (self.codes, self.scale, self.zero_point)
        return sum(tensor.nbytes for tensor in held)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What a safetensors file holds of this weight."""
        found = {"codes": self.codes, "scale": self.scale, "zero_point": self.zero_point, "order": self.order}
        return {f"{name}.{part}": tensor for part, tensor in found.items() if tensor is not None}

    @classmethod
    def of_tensors(
        cls, tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], format: WeightFormat
    ) -> PackedWeight:
        """The weight ``tensors`` wrote. Raises CorruptFile where a tensor is missing or of another type."""
        codes, scale = tensors.get(f"{name}.codes"), tensors.get(f"{name}.scale")
        zero, order = tensors.get(f"{name}.zero_point"), tensors.get(f"{name}.order")
        if codes is None or scale is None or (zero is None) == format.zero_point:
            raise CorruptFile(f"The codes, scales or zero points of {name!r} ({format}) are missing.")
        if codes.dtype != torch.uint8 or scale.dtype != SCALE_TYPES[format.scale]:
            raise CorruptFile(
                f"{name!r} has codes of {codes.dtype} and scales of {scale.dtype}; {format} has codes of torch.uint8 "
                f"and scales of {SCALE_TYPES[format.scale]}."
            )
        return cls(codes, scale, zero, order, tuple(shape), format)


def pack_weight(weight: QuantizedWeight, order: Tensor | None = None) -> PackedWeight:
    """Pack a weight; ``order`` says which input of the layer each input of ``weight`` is, where it was permuted.

    Raises InvalidRequest for scales that their type cannot hold exactly, and for an order that is no permutation.
    """
    scale = weight.scale.to(SCALE_TYPES[weight.format.scale])
    if not torch.equal(scale.float(), weight.scale):
        raise InvalidRequest(
            f"The scales of {weight.format} are not {scale.dtype} numbers. Round them before the codes are computed."
        )
    if order is not None:
        inputs = weight.codes[0].numel()
        if not torch.equal(order.sort().values, torch.arange(inputs, dtype=order.dtype, device="cpu")):
            raise InvalidRequest(f"An order of inputs is a permutation of 0 to {inputs - 1}, each once.")
        order = order.to(torch.int32)
    bits = weight.format.bits
    zero = None if weight.zero_point is None else pack(weight.zero_point, bits)
    return PackedWeight(
        pack(weight.codes, bits), scale.contiguous(), zero, order, tuple(weight.codes.shape), weight.format
    )


def unpack_weight(packed: PackedWeight) -> QuantizedWeight:
    """The codes, scales and zero points of a packed weight, exactly; its inputs stay permuted."""
    bits, scale = packed.format.bits, packed.scale.float()
    zero = None if packed.zero_point is None else unpack(packed.zero_point, bits, tuple(scale.shape))
    return QuantizedWeight(unpack(packed.codes, bits, packed.shape), scale, zero, packed.format)


def dequantize_packed(packed: PackedWeight) -> Tensor:
    """The float32 weight in the layer's own order of inputs."""
    values = unpack_weight(packed).dequantize()
    if packed.order is None:
        return values
    flat = torch.empty_like(values).flatten(1)
    flat[:, packed.order.long()] = values.flatten(1)
    return flat.reshape(values.shape)
