"""What the matmul kernels compute, in plain math."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from quantkit.runtime.int_linear.reference import quantize_rows
from quantkit.runtime.low_bit_matmul.weights import FP8, INT4_FP8, INT4_HALF, INT8, MatmulWeight, unpack_halves
from quantkit.runtime.token_quant.reference import quantize_rows_fp8_reference, to_e4m3


def weight_values(weight: MatmulWeight, half: torch.dtype = torch.float32) -> Tensor:
    """The numbers that are multiplied, float32 (channels, inputs): products of code and scale are rounded to E4M3 for
    FP8 activations and to ``half`` for 16-bit ones; scales per channel come after the sum.
    """
    if not weight.group:
        return weight.codes.float()
    codes = unpack_halves(weight.codes, weight.group).float().unflatten(1, (-1, weight.group))
    values = (codes * weight.scale.float().unsqueeze(-1)).flatten(1)
    return to_e4m3(values).float() if weight.kind == INT4_FP8 else values.to(half).float()


def quantized_rows(x: Tensor, kind: str) -> tuple[Tensor, Tensor | None]:
    """Activations as a kind of kernel reads them: (values or codes, scale per row or None)."""
    if kind in (INT4_FP8, FP8):
        return quantize_rows_fp8_reference(x)
    return quantize_rows(x.float()) if kind == INT8 else (x, None)


def low_bit_linear_reference(
    x: Tensor, weight: MatmulWeight, bias: Tensor | None = None, gated: bool = False
) -> Tensor:
    """float32 product of rows ``x`` (rows, inputs) with a weight; sums in float64 here, int32 or float32 in kernels.

    ``gated``: the first half of the channels passes SiLU and multiplies the second half.
    """
    rows, scale = quantized_rows(x, weight.kind)
    half = x.dtype if weight.kind == INT4_HALF else torch.float32
    out = (rows.double() @ weight_values(weight, half).double().t()).float()
    if scale is not None:
        out = out * scale.unsqueeze(1)
    if not weight.group:
        out = out * weight.scale
    out = out * weight.tensor_scale
    if bias is not None:
        out = out + bias
    if gated:
        gate, up = out.chunk(2, 1)
        return F.silu(gate) * up
    return out
