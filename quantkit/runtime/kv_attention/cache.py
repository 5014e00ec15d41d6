"""A key-value cache of four-bit codes: one scale per token and head, halves of a head side by side.

Byte i of a head holds channel i in its low half and channel i + d / 2 in its high half, both plus 8: the two channels
that rotary embeddings turn together.

RoPE-aware scaling (FireQ): keys have outlier channels, which a scale per token cannot serve. Before RoPE, both
channels of a rotary pair may be scaled by one factor, since a rotation commutes with it: ``pre_rope_factors`` finds
them, and ``fold_pre_rope`` folds them into the projections. After RoPE any channel may be scaled:
``post_rope_factors`` takes the largest channels and their partners, keys are multiplied by them as they are stored,
queries divided when they are read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import InvalidRequest

CODE_TOP = 7
TARGET = 8.0  # what the largest key of a scaled channel becomes (FireQ's alpha and beta)
TOP_CHANNELS = 8
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class KVCache:
    """``keys``, ``values`` uint8 (batch, heads, tokens, dim / 2), scales float32 (batch, heads, tokens);
    ``key_factors`` float32 (heads, dim), by which keys were multiplied.
    """

    keys: Tensor
    key_scale: Tensor
    values: Tensor
    value_scale: Tensor
    key_factors: Tensor

    @property
    def tokens(self) -> int:
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.keys, self.key_scale, self.values, self.value_scale))

    def extended(self, keys: Tensor, values: Tensor) -> KVCache:
        """This cache with further tokens behind its own."""
        new = quantize_kv(keys, values, self.key_factors)
        pairs = zip(self.stored(), new.stored(), strict=True)
        keys, key_scale, values, value_scale = (torch.cat(pair, 2) for pair in pairs)
        return KVCache(keys, key_scale, values, value_scale, self.key_factors)

    def stored(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What grows with the tokens: keys, their scale, values, their scale."""
        return self.keys, self.key_scale, self.values, self.value_scale


def quantize_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """(bytes, scale) of (batch, heads, tokens, dim): symmetric, codes -7 to 7."""
    scale = (x.float().abs().amax(-1) / CODE_TOP).clamp_min(SMALLEST_SCALE)
    codes = torch.round(x.float() / scale.unsqueeze(-1)).clamp(-CODE_TOP, CODE_TOP)
    low, high = (codes + 8).to(torch.uint8).chunk(2, -1)
    return low | high << 4, scale


def quantize_kv(keys: Tensor, values: Tensor, key_factors: Tensor | None = None) -> KVCache:
    """A cache of keys (after RoPE) and values (batch, heads, tokens, dim). Raises InvalidRequest for odd
    dimensions.
    """
    if keys.shape != values.shape or keys.dim() != 4 or keys.shape[-1] % 2:
        raise InvalidRequest(
            f"A cache holds keys and values of one shape (batch, heads, tokens, even dim), not {tuple(keys.shape)} "
            f"and {tuple(values.shape)}."
        )
    factors = torch.ones(keys.shape[1], keys.shape[3], device=keys.device) if key_factors is None else key_factors
    return KVCache(*quantize_heads(keys.float() * factors.unsqueeze(1)), *quantize_heads(values), factors)


def pre_rope_factors(keys: Tensor) -> Tensor:
    """Factors (heads, dim) that bring the largest radius of every rotary pair (i, i + dim / 2) over all tokens of
    ``keys`` (batch, heads, tokens, dim) to ``TARGET``. RoPE leaves radii alone, so the keys may come from after it
    too.
    """
    first, second = keys.float().chunk(2, -1)
    radius = (first.square() + second.square()).sqrt().amax((0, 2)).clamp_min(SMALLEST_SCALE)
    return torch.cat((TARGET / radius, TARGET / radius), -1)


def post_rope_factors(keys: Tensor, top: int = TOP_CHANNELS) -> Tensor:
    """Factors (heads, dim) that bring the ``top`` channels of each head with the largest keys after RoPE, and their
    partners in rotation, to ``TARGET``; 1 for the others.
    """
    largest = keys.float().abs().amax((0, 2))
    dim = keys.shape[-1]
    chosen = largest.topk(min(top, dim), -1).indices
    mask = torch.zeros_like(largest, dtype=torch.bool)
    mask.scatter_(1, chosen, True)
    mask |= mask.roll(dim // 2, 1)
    return torch.where(mask, TARGET / largest.clamp_min(SMALLEST_SCALE), 1.0)


def fold_pre_rope(query: Tensor, key: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """(query, key) projection weights (output channels x inputs) with key rows multiplied by ``factors`` (key heads,
    dim) and the rows of every query head that reads them divided: attention stays the same.
    """
    heads, dim = factors.shape
    per_key_head = query.shape[0] // (heads * dim)
    by_query = factors.repeat_interleave(per_key_head, 0).reshape(-1, 1)
    return query / by_query, key * factors.reshape(-1, 1)
