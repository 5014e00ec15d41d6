"""True-size storage of 2- to 8-bit codes as bit planes: exact both ways, padded to whole bytes per plane.

A code of b bits is offset to unsigned, split into planes of 8, 4, 2 and 1 bits (high bits first; 3 = 2 + 1,
5 = 4 + 1, 6 = 4 + 2), and each plane is packed little end first, the order ONNX uses for its 4- and 2-bit types.
Planes of whole power-of-two width unpack with one shift and one mask, in onnxruntime as in torch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantkit.errors import CorruptFile
from quantkit.formats import bit_planes, packed_bytes


def split_planes(codes: Tensor, bits: int) -> list[tuple[int, Tensor]]:
    """(plane width, unsigned plane values as uint8, flat), high plane first, of signed codes of ``bits`` bits."""
    unsigned = codes.reshape(-1).view(torch.uint8) + (1 << bits - 1)  # modulo 256, as two's complement has it
    planes, shift = [], bits
    for width in bit_planes(bits):
        shift -= width
        planes.append((width, (unsigned >> shift) & ((1 << width) - 1)))
    return planes


def pack_plane(values: Tensor, width: int) -> Tensor:
    """Pack uint8 values below 2**width, ``8 // width`` to a byte, first value in the lowest bits."""
    per_byte = 8 // width
    padded = torch.nn.functional.pad(values, (0, -len(values) % per_byte)).reshape(-1, per_byte)
    packed = padded[:, 0].clone()
    for position in range(1, per_byte):
        packed |= padded[:, position] << position * width
    return packed


def unpack_plane(packed: Tensor, width: int, count: int) -> Tensor:
    """The inverse of pack_plane for ``count`` values."""
    per_byte = 8 // width
    values = torch.empty(len(packed), per_byte, dtype=torch.uint8, device="cpu")
    for position in range(per_byte):
        torch.bitwise_and(packed >> position * width, (1 << width) - 1, out=values[:, position])
    return values.reshape(-1)[:count]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Signed codes of ``bits`` bits as one uint8 vector of ``packed_bytes(codes.numel(), bits)`` bytes, plane after
    plane.
    """
    return torch.cat([pack_plane(plane, width) for width, plane in split_planes(codes, bits)])


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The int8 codes of ``pack``. Raises CorruptFile when the byte count does not belong to this shape and width."""
    count = math.prod(shape)
    if packed.numel() != packed_bytes(count, bits):
        raise CorruptFile(
            f"{packed.numel()} packed bytes found where {count} codes of {bits} bits take "
            f"{packed_bytes(count, bits)}: the file is damaged or belongs to another model."
        )
    unsigned = torch.zeros(count, dtype=torch.uint8, device="cpu")
    start = 0
    for width in bit_planes(bits):
        size = math.ceil(count * width / 8)
        plane = unpack_plane(packed[start : start + size], width, count)
        unsigned = plane if width == 8 else (unsigned << width) | plane
        start += size
    return (unsigned - (1 << bits - 1)).view(torch.int8).reshape(shape)  # modulo 256 again
