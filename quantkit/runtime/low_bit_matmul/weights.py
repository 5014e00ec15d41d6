"""Weights as the matmul kernels read them, and what each kind computes.

A four-bit weight is packed so that no nibble has to change its place: of every group of inputs, byte j holds input j
in its low half and input j + group / 2 in its high half, both plus 8. So two products of half a group each use one
load.

FireQ (llm-fireq): group scales are E4M3 numbers, and so are the products of code and scale, as the hardware multiplies
them; a power of two for the whole tensor keeps small scales out of the subnormal range. Both are part of the
definition here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import InvalidRequest
from quantkit.numbers.packed_weight import packed_scale
from quantkit.numbers.scales import SMALLEST_E4M3, per_tensor_power
from quantkit.numbers.uniform import QuantizedWeight
from quantkit.runtime.token_quant.fp8 import LARGEST, to_e4m3

INT4_FP8, INT4_HALF, FP8, INT8 = "int4 x fp8", "int4 x half", "fp8 x fp8", "int8 x int8"
SMALLEST_GROUP = {INT4_FP8: 64, INT4_HALF: 32}  # half of it is the shortest product the hardware has
_CODE_TOP = 7


@dataclass(frozen=True)
class MatmulWeight:
    """``codes``: uint8 (channels, inputs / 2) or FP8 or int8 (channels, inputs). ``scale``: (channels, groups) for
    four bits (E4M3 or float32), (channels,) float32 otherwise. The result is multiplied by ``tensor_scale``.
    """

    kind: str
    codes: Tensor
    scale: Tensor
    group: int = 0
    tensor_scale: float = 1.0

    @property
    def channels(self) -> int:
        return self.codes.shape[0]

    @property
    def inputs(self) -> int:
        return self.codes.shape[1] * (2 if self.group else 1)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes


def quantize_fireq(weight: Tensor, group: int = 128) -> MatmulWeight:
    """A float weight (channels, inputs) rounded to nearest in FireQ's format."""
    grouped = weight.float().unflatten(1, (-1, group))
    largest = grouped.abs().amax(-1)
    power = 2.0 ** per_tensor_power(largest / _CODE_TOP, _CODE_TOP)
    scale = to_e4m3((largest * power / _CODE_TOP).clamp_min(SMALLEST_E4M3))
    codes = torch.round(grouped * power / scale.float().unsqueeze(-1)).clamp(-8, _CODE_TOP).to(torch.int8)
    return MatmulWeight(INT4_FP8, pack_halves(codes.flatten(1), group), scale, group, 1 / power)


def pack_halves(codes: Tensor, group: int) -> Tensor:
    """int8 codes of four bits (channels, inputs) as bytes (channels, inputs / 2)."""
    unsigned = (codes + 8).to(torch.uint8).unflatten(1, (-1, 2, group // 2))
    return (unsigned[:, :, 0] | unsigned[:, :, 1] << 4).flatten(1).contiguous()


def four_bit_weight(weight: QuantizedWeight, fp8: bool) -> MatmulWeight:
    """Codes with a scale per group, for FP8 activations (scales that E4M3 holds) or 16-bit ones. Raises InvalidRequest
    for other formats.
    """
    kind, group = (INT4_FP8 if fp8 else INT4_HALF), weight.codes.shape[1] // weight.scale.shape[1]
    if weight.format.fmt != "4" or weight.zero_point is not None or group % 32 or group < SMALLEST_GROUP[kind]:
        raise InvalidRequest(
            f"The {kind} kernel runs symmetric 4-bit weights in groups of a multiple of 32, at least "
            f"{SMALLEST_GROUP[kind]}, not {weight.format} with groups of {group}."
        )
    if group & (group - 1):
        raise InvalidRequest(f"The {kind} kernel needs groups of a power of two, not {group}.")
    if fp8 and weight.format.scale != "f8":
        raise InvalidRequest(
            f"The scales of {weight.format} are not E4M3 numbers: quantize with sf8 scales, or by quantize_fireq."
        )
    scale, shared = packed_scale(weight) if fp8 else (weight.scale.contiguous(), None)
    return MatmulWeight(kind, pack_halves(weight.codes, group), scale, group, 1.0 if shared is None else float(shared))


def fp8_weight(weight: Tensor) -> MatmulWeight:
    """A float weight rounded to E4M3 with a scale per channel."""
    scale = (weight.float().abs().amax(1) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return MatmulWeight(FP8, to_e4m3(weight.float() / scale.unsqueeze(1)), scale)


def int8_weight(weight: QuantizedWeight) -> MatmulWeight:
    """Codes of at most 8 bits with a scale per channel."""
    if weight.scale.shape[1] != 1 or weight.zero_point is not None or weight.format.bits > 8:
        raise InvalidRequest(
            f"The {INT8} kernel runs symmetric weights with one scale a channel, not {weight.format}."
        )
    return MatmulWeight(INT8, weight.codes.contiguous(), weight.scale.squeeze(1).contiguous())
