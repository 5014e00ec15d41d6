"""Attention in the notations that people use, and the networks around it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.program.nets.entry import architecture, padding_mask, randn, sequences, token_ids

WIDTH, HEADS = 8, 2
LENGTHS = (6, 9, 3)


class AttentionBlock(nn.Module):
    """Pre-norm block around an attention that maps (samples, tokens, width) to the same shape."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = attention
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class LanguageModel(nn.Module):
    """Two blocks between an embedding with learned positions and a head."""

    def __init__(self, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, WIDTH)
        self.positions = nn.Parameter(torch.randn(1, 16, WIDTH))
        self.blocks = nn.ModuleList([AttentionBlock(attention()) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 13)

    def forward(self, ids):
        x = self.embed(ids) + self.positions[:, : ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


LANGUAGE_MODEL: dict[str, Any] = {"lengths": LENGTHS, "blocks": 2, "added_tables": ("positions",)}
TOKENS = token_ids(13, LENGTHS[0])


def heads_first(x: Tensor) -> Tensor:
    """(samples, tokens, width) as (samples, heads, tokens, width per head)."""
    return x.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)


def causal(length: int, device: torch.device) -> Tensor:
    """(length, length), True where a query may look."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


class ChunkedAttention(nn.Module):
    """One projection cut by ``chunk``; scaled_dot_product_attention with a boolean mask."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def mask(self, x: Tensor) -> Tensor | None:
        return causal(x.shape[1], x.device)

    def forward(self, x):
        q, k, v = (heads_first(part) for part in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(x))
        return self.proj(y.transpose(1, 2).flatten(2))


@architecture(TOKENS, **LANGUAGE_MODEL)
def chunked_attention_with_boolean_mask():
    return LanguageModel(ChunkedAttention)


class MaskAboveOne(ChunkedAttention):
    """The mask is built only where there is something to hide."""

    def mask(self, x: Tensor) -> Tensor | None:
        return super().mask(x) if x.shape[1] > 1 else None


@architecture(TOKENS, **(LANGUAGE_MODEL | {"lengths": (6, 9, 1), "control_flow": ("length",)}))
def mask_above_one_token():
    return LanguageModel(MaskAboveOne)


class GroupedAttention(nn.Module):
    """Two queries for each key; scaled_dot_product_attention repeats the keys itself."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, WIDTH // HEADS), nn.Linear(WIDTH, WIDTH // HEADS)

    def forward(self, x):
        q, k, v = heads_first(self.q(x)), heads_first(self.k(x)), heads_first(self.v(x))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.proj(y.transpose(1, 2).flatten(2))


@architecture(TOKENS, **LANGUAGE_MODEL)
def grouped_query_attention():
    return LanguageModel(GroupedAttention)


class EinsumAttention(nn.Module):
    """Projections kept per head in three dimensions; every product an einsum; a causal mask filled in."""

    def __init__(self) -> None:
        super().__init__()
        width = WIDTH // HEADS
        self.q, self.k, self.v = (nn.Parameter(torch.randn(WIDTH, HEADS, width) * 0.3) for _ in range(3))
        self.out = nn.Parameter(torch.randn(HEADS, width, WIDTH) * 0.3)

    def forward(self, x):
        q, k, v = (torch.einsum("btc,chd->bthd", x, weight) for weight in (self.q, self.k, self.v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~causal(x.shape[1], x.device), float("-inf"))
        return torch.einsum("bhts,bshd,hdc->btc", scores.softmax(-1), v, self.out)


@architecture(TOKENS, **LANGUAGE_MODEL)
def einsum_attention():
    return LanguageModel(EinsumAttention)


class Checkpointed(LanguageModel):
    def forward(self, ids):
        x = self.embed(ids) + self.positions[:, : ids.shape[1]]
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(self.norm(x))


@architecture(TOKENS, **LANGUAGE_MODEL)
def checkpointed_blocks():
    return Checkpointed(ChunkedAttention)


class TiedHead(LanguageModel):
    """The embedding's own weight makes the logits, through F.linear."""

    def __init__(self) -> None:
        super().__init__(ChunkedAttention)
        del self.head

    def forward(self, ids):
        x = self.embed(ids) * math.sqrt(WIDTH) + self.positions[:, : ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embed.weight)


@architecture(TOKENS, **LANGUAGE_MODEL)
def tied_head_by_function():
    return TiedHead()


class SelfAttention(nn.Module):
    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        y, weights = self.attention(x, x, x)
        return self.head(x + y), weights


@architecture(sequences(WIDTH, 6), lengths=LENGTHS)
def multihead_attention():
    return SelfAttention()


@architecture(sequences(WIDTH, 6), lengths=LENGTHS, added_tables=("attention.bias_k", "attention.bias_v"))
def multihead_attention_with_extra_key():
    return SelfAttention(add_bias_kv=True, add_zero_attn=True)


class CrossAttention(nn.Module):
    """Keys and values of other widths, so that the three projections are separate weights; padded keys."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, kdim=6, vdim=10, batch_first=True)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, query, key, value, keep):
        y, _ = self.attention(query, key, value, key_padding_mask=~keep, need_weights=False)
        return self.head(query + y)


def cross_batch(samples: int, length: int | None = None, seed: int = 0) -> tuple[tuple, dict[str, Any]]:
    length = length or LENGTHS[0]
    query = randn(samples, length, WIDTH, seed=seed)
    key, value = randn(samples, length + 2, 6, seed=seed + 1), randn(samples, length + 2, 10, seed=seed + 2)
    return (query, key, value), {"keep": padding_mask(samples, length + 2)}


@architecture(cross_batch, lengths=LENGTHS)
def multihead_cross_attention():
    return CrossAttention()


class Encoder(nn.Module):
    """TransformerEncoder; with a mask, the mean over what is not padding (under it the fast path writes zeros)."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x, keep=None):
        if keep is None:
            return self.head(self.encoder(x))
        x = self.encoder(x, src_key_padding_mask=~keep) * keep[..., None]
        return self.head(x.sum(1) / keep.sum(1, keepdim=True))


@architecture(sequences(WIDTH, 6), lengths=LENGTHS, blocks=2)
def transformer_encoder_fast_path():
    return Encoder(norm_first=False)


@architecture(sequences(WIDTH, 6), lengths=LENGTHS, blocks=2)
def transformer_encoder_norm_first():
    return Encoder(norm_first=True)


def padded_batch(samples: int, length: int | None = None, seed: int = 0) -> tuple[tuple, dict[str, Any]]:
    length = length or LENGTHS[0]
    return (randn(samples, length, WIDTH, seed=seed), padding_mask(samples, length)), {}


@architecture(padded_batch, lengths=LENGTHS, blocks=2)
def transformer_encoder_padded():
    return Encoder(norm_first=False)


class Translator(nn.Module):
    """nn.Transformer in its own layout, tokens before samples, with a causal mask over the target."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, WIDTH)
        self.transformer = nn.Transformer(WIDTH, HEADS, 2, 2, 16)
        self.head = nn.Linear(WIDTH, 13)

    def forward(self, source, target):
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        source, target = self.embed(source).transpose(0, 1), self.embed(target).transpose(0, 1)
        return self.head(self.transformer(source, target, tgt_mask=mask)).transpose(0, 1)


def translation_batch(samples: int, length: int | None = None, seed: int = 0) -> tuple[tuple, dict[str, Any]]:
    (source,), _ = TOKENS(samples, length, seed)
    (target,), _ = TOKENS(samples, (length or LENGTHS[0]) - 1, seed + 1)
    return (source,), {"target": target}


@architecture(translation_batch, lengths=LENGTHS, blocks=4)
def transformer_encoder_decoder():
    return Translator()
