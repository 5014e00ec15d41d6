"""Attention over a four-bit cache with FP8 queries, in plain math."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.runtime.kv_attention.cache import KVCache, dequantize_heads
from quantkit.runtime.token_quant.reference import quantize_rows_fp8_reference


def quantized_queries(queries: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
    """(FP8 codes, scale) of queries (batch, query heads, positions, dim), divided by what the keys were multiplied
    by.
    """
    groups = queries.shape[1] // cache.key_factors.shape[0]
    factors = cache.key_factors.repeat_interleave(groups, 0).unsqueeze(1)
    return quantize_rows_fp8_reference(queries.float() / factors)


def kv_attention_reference(queries: Tensor, cache: KVCache, causal: bool = True) -> Tensor:
    """float32 (batch, query heads, positions, dim). The last position is the cache's last token; with ``causal`` every
    position sees the tokens up to its own. Only queries, keys and values are quantized here.
    """
    codes, scale = quantized_queries(queries, cache)
    groups = queries.shape[1] // cache.keys.shape[1]
    keys = dequantize_heads(cache.keys, cache.key_scale).repeat_interleave(groups, 1)
    values = dequantize_heads(cache.values, cache.value_scale).repeat_interleave(groups, 1)
    scores = (codes.float() * scale.unsqueeze(-1)) @ keys.transpose(2, 3) * queries.shape[-1] ** -0.5
    if causal:
        positions, tokens = queries.shape[2], cache.tokens
        seen = torch.arange(tokens, device="cpu") <= torch.arange(tokens - positions, tokens, device="cpu").unsqueeze(
            1
        )
        scores = scores.masked_fill(~seen.to(scores.device), -torch.inf)
    return torch.softmax(scores, -1) @ values
