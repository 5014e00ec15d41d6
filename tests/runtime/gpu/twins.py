"""What the Triton kernels compute, in plain math."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from quantkit.runtime.int_linear.reference import quantize_rows
from quantkit.runtime.kv_attention.cache import KVCache
from quantkit.runtime.low_bit_matmul.weights import FP8, INT4_FP8, INT4_HALF, INT8, MatmulWeight
from quantkit.runtime.token_quant.fp8 import LARGEST, SMALLEST_SCALE, to_e4m3


def rms_norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """float32 rows divided by their root mean square, times ``gain``."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * gain.float()


def quantize_rows_fp8_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """(FP8 codes, float32 scale) of every row: its largest magnitude becomes 448."""
    x = x.float()
    largest = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    scale = (largest / LARGEST).clamp_min(SMALLEST_SCALE)
    return to_e4m3(x / scale.unsqueeze(-1)), scale


def unpack_halves(packed: Tensor, group: int) -> Tensor:
    """The codes of ``pack_halves``."""
    halves = packed.unflatten(1, (-1, group // 2))
    return (torch.stack((halves & 15, halves >> 4), 2).flatten(1).to(torch.int8)) - 8


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


def dequantize_heads(packed: Tensor, scale: Tensor) -> Tensor:
    """float32 values of ``quantize_heads``."""
    codes = torch.cat((packed & 15, packed >> 4), -1).float() - 8
    return codes * scale.unsqueeze(-1)


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
        seen = torch.arange(tokens) <= torch.arange(tokens - positions, tokens).unsqueeze(1)
        scores = scores.masked_fill(~seen.to(scores.device), -torch.inf)
    return torch.softmax(scores, -1) @ values
