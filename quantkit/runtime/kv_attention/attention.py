"""Attention with FP8 queries over a four-bit cache, behind one function."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from quantkit.errors import InvalidRequest
from quantkit.runtime.kv_attention.cache import KVCache
from quantkit.runtime.kv_attention.kernel import attend, join
from quantkit.runtime.token_quant.kernel import quantize_rows_fp8

MOST_ROWS = 64
TOKENS = 64
JOINED_ROWS = 16
PROGRAMS = 256  # enough to fill a large GPU


def kv_attention(
    queries: Tensor, cache: KVCache, causal: bool = True, split: int | None = None, tokens_at_once: int = TOKENS
) -> Tensor:
    """Attention of ``queries`` (batch, query heads, positions, dim), in their type and shape. The last position is the
    cache's last token; with ``causal`` every position sees the tokens up to its own. Probabilities times value scales
    are rounded to FP8.

    ``split`` parts the tokens among programs (default: by the number of programs there are otherwise).
    """
    require_queries(queries, cache, causal)
    batch, heads, positions, dim = queries.shape
    key_heads = cache.keys.shape[1]
    group = heads // key_heads
    out = torch.empty_like(queries, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    factors = cache.key_factors.repeat_interleave(group, 0).unsqueeze(1)
    codes, scale = quantize_rows_fp8(queries.float() / factors)
    total = positions * group
    rows = max(16, min(MOST_ROWS, triton.next_power_of_2(total)))
    programs = triton.cdiv(total, rows) * batch * key_heads
    parts = split or max(1, min(PROGRAMS // programs, triton.cdiv(cache.tokens, 4 * tokens_at_once)))
    parts = min(parts, triton.cdiv(cache.tokens, tokens_at_once))
    every = batch * key_heads * total
    partial = torch.empty(parts, every, dim, dtype=torch.float32, device=out.device)
    largest, sums = (torch.empty(parts, every, dtype=torch.float32, device=out.device) for _ in range(2))
    held = (tensor.contiguous() for tensor in cache.stored())
    grid = (triton.cdiv(total, rows), batch * key_heads, parts)
    attend[grid](
        codes, scale, *held, partial, largest, sums, positions, cache.tokens, dim**-0.5,
        group, dim, causal, parts, rows, tokens_at_once,
    )  # fmt: skip
    join[(triton.cdiv(every, JOINED_ROWS),)](
        partial, largest, sums, out, every, positions, group, dim, parts, JOINED_ROWS
    )
    return out


def require_queries(queries: Tensor, cache: KVCache, causal: bool) -> None:
    """Raise InvalidRequest, naming what does not fit, for queries that this cache cannot answer."""
    key_heads, dim = cache.key_factors.shape
    if queries.dim() != 4 or queries.shape[0] != cache.keys.shape[0] or queries.shape[3] != dim:
        raise InvalidRequest(
            f"A cache of {cache.keys.shape[0]} sequences and heads of {dim} takes queries (batch, heads, positions, "
            f"{dim}), not {tuple(queries.shape)}."
        )
    if queries.shape[1] % key_heads:
        raise InvalidRequest(f"{queries.shape[1]} query heads are no multiple of {key_heads} key heads.")
    if dim < 32 or dim & (dim - 1):
        raise InvalidRequest(f"The attention kernel runs heads of 32, 64, 128 or 256 channels, not {dim}.")
    if cache.tokens == 0 or (causal and queries.shape[2] > cache.tokens):
        raise InvalidRequest(
            f"{queries.shape[2]} positions need as many tokens in the cache, which has {cache.tokens}."
        )
