"""What an integer linear layer computes and takes: every version of it equals the others bit for bit.

Activations are signed bytes, each row with its own scale; weights are signed codes with a scale (and a zero point) per
output channel and group of inputs. Sums of products are integers; each group's sum becomes one float32, is multiplied
by its scale and added to the groups before it, each operation rounded, and the row's scale comes last.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.errors import InvalidRequest

LARGEST_CODE = 127
SMALLEST_STEP = torch.finfo(torch.float32).tiny
LARGEST_INPUTS = 1 << 16  # 65536 * 255 * 128 fits 32 bits


class Rows(NamedTuple):
    """Activations of a layer: int8 codes (rows, inputs) and a scale for each row."""

    codes: Tensor
    scale: Tensor


def quantize_rows(x: Tensor) -> Rows:
    """Codes and scales of float32 rows: symmetric, the largest magnitude of a row is code 127."""
    largest = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    scale = (largest / LARGEST_CODE).clamp_min(SMALLEST_STEP)
    return Rows(torch.round(x / scale.unsqueeze(-1)).clamp(-LARGEST_CODE, LARGEST_CODE).to(torch.int8), scale)


def require_inputs(inputs: int) -> None:
    """Raise InvalidRequest for layers whose sums can pass 32 bits."""
    if inputs > LARGEST_INPUTS:
        raise InvalidRequest(
            f"{inputs} inputs can overflow 32-bit sums; integer kernels take at most {LARGEST_INPUTS}. "
            "Split the layer, or leave it float."
        )


def require_operands(activations: Tensor, inputs: int, groups: int, offset: Tensor | None) -> None:
    """The contract of every integer linear kernel; raises InvalidRequest, naming what does not fit."""
    if activations.dtype != torch.int8 or activations.dim() != 2 or activations.shape[1] != inputs:
        raise InvalidRequest(
            f"An integer linear layer of {inputs} inputs takes int8 rows of that length, not {activations.dtype} of "
            f"shape {tuple(activations.shape)}."
        )
    require_inputs(inputs)
    if offset is not None and groups != 1:
        raise InvalidRequest("An integer offset needs weights with one scale per channel: else no sum takes it.")
