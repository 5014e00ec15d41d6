"""Integer products through torch's operators, exactly: for installations without the compiled kernels.

- ``int_mm``: ``torch._int_mm``, fast where oneDNN has VNNI, a slow loop elsewhere.
- ``float_mm``: a float32 matmul of integers in parts short enough that no sum passes 2^24, so that nothing rounds.

oneDNN's prepacked linear is not used: on AVX2 it adds pairs of products in 16 bits, which saturate for weights beyond
7 bits, and with VNNI it is slower than the compiled kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.runtime.int_linear.reference import LARGEST_CODE, Rows

EXACT_IN_FLOAT = 1 << 24


def has_vnni() -> bool:
    """True where oneDNN computes 8-bit products into 32 bits."""
    return bool(torch.cpu._is_vnni_supported())


def int_mm(activations: Tensor, codes: Tensor) -> Tensor:
    """int32 (rows, channels) sums of int8 rows and int8 (channels, inputs) codes."""
    return torch._int_mm(activations, codes.t())


def float_mm(activations: Tensor, codes: Tensor) -> Tensor:
    """``int_mm`` through float32."""
    largest = max(1, int(codes.to(torch.int16).abs().max())) if codes.numel() else 1
    part = max(1, EXACT_IN_FLOAT // ((LARGEST_CODE + 1) * largest))
    sums = torch.zeros(activations.shape[0], codes.shape[0], dtype=torch.int32, device="cpu")
    for start in range(0, codes.shape[1], part):
        end = start + part
        sums += (activations[:, start:end].float() @ codes[:, start:end].float().t()).to(torch.int32)
    return sums


def int_linear_torch(
    rows: Rows,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """float32 (rows, channels) of ``rows`` and int8 ``codes`` (channels, inputs), on torch's fastest exact integer
    product.

    ``scale`` and ``zero_point`` (channels, groups); ``offset`` int32 (channels,) is added to the integer sums, where
    there is one group; ``bias`` (channels,) to the result.
    """
    activations, activation_scale = rows
    multiply = int_mm if has_vnni() and activations.numel() and codes.numel() else float_mm
    per_group = codes.shape[1] // scale.shape[1]
    total = torch.zeros(activations.shape[0], codes.shape[0], dtype=torch.float32, device="cpu")
    for group in range(scale.shape[1]):
        part = slice(group * per_group, (group + 1) * per_group)
        inside = activations[:, part].contiguous()
        sums = multiply(inside, codes[:, part].contiguous())
        if zero_point is not None:
            sums = sums - inside.sum(1, dtype=torch.int32).unsqueeze(1) * zero_point[:, group].to(torch.int32)
        if offset is not None:
            sums = sums + offset
        total += sums.float() * scale[:, group]
    total *= activation_scale.unsqueeze(1)
    return total if bias is None else total + bias
