"""One Triton matmul for four kinds of operands, with split-K for few rows.

Work is counted in steps along the inputs: a group for four-bit weights, STEP inputs otherwise. With SPLIT programs
along the inputs, each writes its partial sums, and ``finish`` adds them in order: the result is the same in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit.runtime.triton_rounding import as_type, to_e4m3


@triton.jit
def four_bit_sums(
    a, w, scale, rows, columns, M, N, K, first, last,
    FP8: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Sums over groups ``first`` to before ``last`` of activations and weights of four bits. WIDE multiplies in
    float32 what was rounded to bfloat16, which the interpreter cannot multiply.
    """
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    step = tl.arange(0, STEP)
    row_mask, column_mask = rows[:, None] < M, columns[None, :] < N
    for group in range(first, last):
        by = tl.load(scale + columns * (K // GROUP) + group, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        for inner in tl.static_range(0, GROUP // 2, STEP):
            at = group * (GROUP // 2) + inner + step
            both = tl.load(w + columns[None, :] * (K // 2) + at[:, None], mask=column_mask, other=0).to(tl.int32)
            start = a + rows[:, None] * K + group * GROUP + inner + step[None, :]
            low = ((both & 15) - 8).to(tl.float32) * by
            high = ((both >> 4) - 8).to(tl.float32) * by
            if FP8:
                low, high = to_e4m3(low), to_e4m3(high)
            else:
                low, high = as_type(low, a.dtype.element_ty), as_type(high, a.dtype.element_ty)
            left = tl.load(start, mask=row_mask, other=0.0)
            right = tl.load(start + GROUP // 2, mask=row_mask, other=0.0)
            if WIDE:
                low, high = low.to(tl.float32), high.to(tl.float32)
                left, right = left.to(tl.float32), right.to(tl.float32)
            acc = tl.dot(left, low, acc, allow_tf32=False)
            acc = tl.dot(right, high, acc, allow_tf32=False)
    return acc


@triton.jit
def byte_sums(
    a, w, rows, columns, M, N, K, first, last,
    INTEGER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Sums over steps ``first`` to before ``last`` of one-byte activations and weights: int32 for integers, else
    float32.
    """
    acc = tl.zeros((ROWS, COLUMNS), tl.int32 if INTEGER else tl.float32)
    zero: tl.constexpr = 0 if INTEGER else 0.0
    for step in range(first, last):
        at = step * STEP + tl.arange(0, STEP)
        left = tl.load(a + rows[:, None] * K + at[None, :], mask=(rows[:, None] < M) & (at[None, :] < K), other=zero)
        right = tl.load(
            w + columns[None, :] * K + at[:, None], mask=(columns[None, :] < N) & (at[:, None] < K), other=zero
        )
        acc = tl.dot(left, right, acc, out_dtype=tl.int32 if INTEGER else tl.float32)
    return acc


@triton.jit
def scaled(
    sums, rows, columns, row_scale, channel_scale, bias, M, N, tensor_scale,
    SCALED_ROWS: tl.constexpr, SCALED_CHANNELS: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """The epilogue: scales of rows, channels and the tensor, then the bias."""
    out = sums.to(tl.float32)
    if SCALED_ROWS:
        out = out * tl.load(row_scale + rows, mask=rows < M, other=0.0)[:, None]
    if SCALED_CHANNELS:
        out = out * tl.load(channel_scale + columns, mask=columns < N, other=0.0)[None, :]
    out = out * tensor_scale
    if BIASED:
        out = out + tl.load(bias + columns, mask=columns < N, other=0.0)[None, :]
    return out


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def matmul(
    a, row_scale, w, scale, bias, out, partial, M, N, K, steps, tensor_scale,
    FOUR_BITS: tl.constexpr, FP8: tl.constexpr, WIDE: tl.constexpr, INTEGER: tl.constexpr, GROUP: tl.constexpr,
    GATED: tl.constexpr, SCALED_ROWS: tl.constexpr, BIASED: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One tile of the output, or its sums over one of SPLIT parts of the inputs. N counts output columns: a gated
    weight has 2 N channels, gates first.
    """
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    part = tl.program_id(2)
    first, last = part * steps // SPLIT, (part + 1) * steps // SPLIT
    for half in tl.static_range(0, 2 if GATED else 1):
        channels, limit = columns + half * N, N + half * N
        limited = tl.where(columns < N, channels, limit)  # the next half's channels are not this tile's
        if FOUR_BITS:
            sums = four_bit_sums(
                a, w, scale, rows, limited, M, limit, K, first, last, FP8, WIDE, GROUP, ROWS, COLUMNS, STEP
            )
        else:
            sums = byte_sums(a, w, rows, limited, M, limit, K, first, last, INTEGER, ROWS, COLUMNS, STEP)
        mask = (rows[:, None] < M) & (columns[None, :] < N)
        if SPLIT > 1:
            width = 2 * N if GATED else N
            tl.store(partial + (part * M + rows[:, None]) * width + limited[None, :], sums, mask=mask)
        else:
            value = scaled(
                sums, rows, limited, row_scale, scale, bias, M, limit, tensor_scale, SCALED_ROWS, not FOUR_BITS, BIASED
            )
            if half == 0:  # noqa: SIM108 (the first half knows no result)
                result = value
            else:
                result = silu(result) * value
    if SPLIT == 1:
        place = out + rows[:, None] * N + columns[None, :]
        tl.store(place, as_type(result, out.dtype.element_ty), mask=(rows[:, None] < M) & (columns[None, :] < N))


@triton.jit
def finish(
    partial, row_scale, scale, bias, out, M, N, tensor_scale,
    INTEGER: tl.constexpr, GATED: tl.constexpr, SCALED_ROWS: tl.constexpr, SCALED_CHANNELS: tl.constexpr,
    BIASED: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add the partial sums of a tile in order, and its epilogue."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    width = 2 * N if GATED else N
    for half in tl.static_range(0, 2 if GATED else 1):
        channels, limit = columns + half * N, N + half * N
        sums = tl.zeros((ROWS, COLUMNS), tl.int32 if INTEGER else tl.float32)
        for part in tl.static_range(0, SPLIT):
            sums += tl.load(partial + (part * M + rows[:, None]) * width + channels[None, :], mask=mask, other=0)
        value = scaled(
            sums, rows, channels, row_scale, scale, bias, M, limit, tensor_scale, SCALED_ROWS, SCALED_CHANNELS, BIASED
        )
        if half == 0:  # noqa: SIM108
            result = value
        else:
            result = silu(result) * value
    tl.store(out + rows[:, None] * N + columns[None, :], as_type(result, out.dtype.element_ty), mask=mask)
