"""Flash attention over a four-bit cache, for one new token as for a whole prompt.

A program takes the query heads that share a key head, at some positions, as the rows of its products: for one token
they are what fills a tile. Programs along the tokens write partial results with their maxima and sums, which ``join``
puts together in order. Codes of four bits are exact in FP8, so keys and values are never multiplied out: a token's
key scale goes to its scores, its value scale to its probabilities, which are rounded to FP8 at the block's largest
value.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit.runtime.triton_rounding import as_type, to_e4m3

PROBABILITY_TOP = tl.constexpr(256.0)  # a power of two below 448: what the largest probability of a block becomes


@triton.jit
def half_of(packed, high: tl.constexpr):
    """Codes in one half of bytes, as FP8, which holds them exactly."""
    codes = (packed >> 4) if high else (packed & 15)
    return (codes.to(tl.int32) - 8).to(tl.float32).to(tl.float8e4nv)


@triton.jit
def block_scores(low, high, keys, key_scale, scale, head, token, tokens, last_seen, DIM: tl.constexpr):
    """Scores of rows (their two halves) against a block of tokens; -inf where a row does not see a token."""
    held = token < tokens
    half = tl.arange(0, DIM // 2)
    key = tl.load(keys + (head * tokens + token)[None, :] * (DIM // 2) + half[:, None], mask=held[None, :], other=0)
    score = tl.dot(low, half_of(key, False)) + tl.dot(high, half_of(key, True))
    by = tl.load(key_scale + head * tokens + token, mask=held, other=0.0)
    seen = held[None, :] & (token[None, :] <= last_seen[:, None])
    return tl.where(seen, score * scale[:, None] * by[None, :], -float("inf"))


@triton.jit
def block_values(chance, values, value_scale, head, token, tokens, DIM: tl.constexpr):
    """What a block of tokens adds to the two halves of each row's result."""
    held = token < tokens
    half = tl.arange(0, DIM // 2)
    weight = tl.load(value_scale + head * tokens + token, mask=held, other=0.0)
    room = tl.max(weight, 0)
    rounded = to_e4m3(chance * (weight * (PROBABILITY_TOP / room))[None, :])
    place = values + (head * tokens + token)[:, None] * (DIM // 2) + half[None, :]
    value = tl.load(place, mask=held[:, None], other=0)
    back = room / PROBABILITY_TOP
    return tl.dot(rounded, half_of(value, False)) * back, tl.dot(rounded, half_of(value, True)) * back


@triton.jit
def attend(
    queries, query_scale, keys, key_scale, values, value_scale, partial, largest, sums,
    positions, tokens, softmax_scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, CAUSAL: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Partial attention of ROWS rows (position, head of the group) over one of SPLIT parts of the tokens."""
    head, part = tl.program_id(1).to(tl.int64), tl.program_id(2)  # of all batches' key heads
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = positions * GROUP
    inside = rows < total
    place = (head * GROUP + rows % GROUP) * positions + rows // GROUP
    half = tl.arange(0, DIM // 2)
    low = tl.load(queries + place[:, None] * DIM + half[None, :], mask=inside[:, None], other=0.0)
    high = tl.load(queries + place[:, None] * DIM + half[None, :] + DIM // 2, mask=inside[:, None], other=0.0)
    scale = tl.load(query_scale + place, mask=inside, other=0.0) * softmax_scale
    last_seen = rows // GROUP + (tokens - positions) if CAUSAL else rows * 0 + (tokens - 1)
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    acc_low, acc_high = tl.zeros((ROWS, DIM // 2), tl.float32), tl.zeros((ROWS, DIM // 2), tl.float32)
    blocks = tl.cdiv(tokens, TOKENS)
    for block in range(part * blocks // SPLIT, (part + 1) * blocks // SPLIT):
        token = block * TOKENS + tl.arange(0, TOKENS)
        score = block_scores(low, high, keys, key_scale, scale, head, token, tokens, last_seen, DIM)
        new_top = tl.maximum(top, tl.max(score, 1))
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)  # rows that see nothing of this block
        chance, fade = tl.exp(score - shift[:, None]), tl.exp(top - shift)
        mass = mass * fade + tl.sum(chance, 1)
        more_low, more_high = block_values(chance, values, value_scale, head, token, tokens, DIM)
        acc_low, acc_high = acc_low * fade[:, None] + more_low, acc_high * fade[:, None] + more_high
        top = new_top
    row = (part * tl.num_programs(1) + head) * total + rows
    tl.store(partial + row[:, None] * DIM + half[None, :], acc_low, mask=inside[:, None])
    tl.store(partial + row[:, None] * DIM + half[None, :] + DIM // 2, acc_high, mask=inside[:, None])
    tl.store(largest + row, top, mask=inside)
    tl.store(sums + row, mass, mask=inside)


@triton.jit
def join(
    partial, largest, sums, out, every, positions,
    GROUP: tl.constexpr, DIM: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Put the parts of ROWS rows together."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = rows < every
    channel = tl.arange(0, DIM)
    top = tl.load(largest + rows, mask=inside, other=0.0)
    for part in tl.static_range(1, SPLIT):
        top = tl.maximum(top, tl.load(largest + part * every + rows, mask=inside, other=0.0))
    acc, mass = tl.zeros((ROWS, DIM), tl.float32), tl.zeros((ROWS,), tl.float32)
    for part in tl.static_range(0, SPLIT):
        fade = tl.exp(tl.load(largest + part * every + rows, mask=inside, other=0.0) - top)
        place = partial + (part * every + rows)[:, None] * DIM + channel[None, :]
        acc += tl.load(place, mask=inside[:, None], other=0.0) * fade[:, None]
        mass += tl.load(sums + part * every + rows, mask=inside, other=1.0) * fade
    total = positions * GROUP
    head, inner = rows // total, rows % total
    place = (head * GROUP + inner % GROUP) * positions + inner // GROUP
    result = as_type(acc / mass[:, None], out.dtype.element_ty)
    tl.store(out + place[:, None] * DIM + channel[None, :], result, mask=inside[:, None])
