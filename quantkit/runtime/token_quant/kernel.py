"""One program quantizes one row: it is read once, normalized where asked, and written as FP8 codes with its scale."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.errors import InvalidRequest
from quantkit.runtime.token_quant.fp8 import E4M3, SMALLEST_SCALE
from quantkit.runtime.triton_rounding import LARGEST, to_e4m3

LARGEST_ROW = 1 << 16  # a row stays in registers


@triton.jit
def quantize_row(x, gain, codes, scales, count, epsilon, smallest, BLOCK: tl.constexpr, NORMALIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    values = tl.load(x + row * count + place, mask=place < count, other=0.0).to(tl.float32)
    if NORMALIZE:
        root = tl.sqrt_rn(tl.sum(values * values, 0) / count + epsilon)
        values = tl.div_rn(values, root) * tl.load(gain + place, mask=place < count, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(values), 0), LARGEST), smallest)
    tl.store(codes + row * count + place, to_e4m3(tl.div_rn(values, scale)), mask=place < count)
    tl.store(scales + row, scale)


def quantize_rows_fp8(x: Tensor, gain: Tensor | None = None, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(FP8 codes, float32 scale) of rows of float32, float16 or bfloat16 in any layout, of any leading dimensions: the
    largest magnitude of a row becomes 448. With ``gain``, of their RMSNorm.
    """
    count = x.shape[-1]
    if not x.is_floating_point() or count > LARGEST_ROW:
        raise InvalidRequest(
            f"FP8 quantization reads floating-point rows of at most {LARGEST_ROW} values, not {x.dtype} of shape "
            f"{tuple(x.shape)}."
        )
    rows = x.reshape(-1, count).contiguous()
    codes = torch.empty(rows.shape, dtype=E4M3, device=x.device)
    scale = torch.empty(len(rows), dtype=torch.float32, device=x.device)
    if rows.numel():
        block = triton.next_power_of_2(count)
        norm = gain is not None
        quantize_row[(len(rows),)](
            rows, gain if norm else rows, codes, scale, count, epsilon, SMALLEST_SCALE, block, norm
        )
    else:
        scale.fill_(SMALLEST_SCALE)
    return codes.reshape(x.shape), scale.reshape(x.shape[:-1])
