"""Attention over four-bit caches equals its reference within FP8 probabilities, for prompts and single tokens, and
scaling keys around RoPE changes nothing but the error.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from quantkit.errors import InvalidRequest
from quantkit.runtime.kv_attention.attention import kv_attention
from quantkit.runtime.kv_attention.cache import (
    CODE_TOP,
    KVCache,
    fold_pre_rope,
    post_rope_factors,
    pre_rope_factors,
    quantize_heads,
    quantize_kv,
)
from tests.runtime.gpu.twins import dequantize_heads, kv_attention_reference


def on(cache: KVCache, device: str) -> KVCache:
    return KVCache(*(t.to(device) for t in (*cache.stored(), cache.key_factors)))


def assert_near_reference(device: str, queries: Tensor, cache: KVCache, causal: bool, split: int | None) -> None:
    """Rounding to FP8 changes a probability by a sixteenth at most, or, where it is subnormal, by half the least step
    of a block whose largest is 256; what attention over the values' magnitudes gives bounds what that can do.
    """
    wanted = kv_attention_reference(queries, cache, causal)
    found = kv_attention(queries.to(device), on(cache, device), causal, split, 16).cpu().float()
    magnitudes = quantize_heads(dequantize_heads(cache.values, cache.value_scale).abs())
    weight = kv_attention_reference(queries, KVCache(*cache.stored()[:2], *magnitudes, cache.key_factors), causal)
    subnormal = 2**-10 / 256 * CODE_TOP * float(cache.value_scale.max()) * cache.tokens
    assert found.shape == wanted.shape
    assert ((found - wanted).abs() <= weight * (1 / 16 + 1 / 256) + subnormal).all()  # 1/256: a result in bfloat16


@st.composite
def problems(draw: st.DrawFn) -> tuple:
    batch, key_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 4))
    dim, tokens = draw(st.sampled_from([32, 64])), draw(st.integers(1, 70))
    causal = draw(st.booleans())
    positions = draw(st.one_of(st.just(1), st.integers(1, min(tokens, 20))))
    random = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    keys, values = torch.randn(2, batch, key_heads, tokens, dim, generator=random)
    factors = torch.rand(key_heads, dim, generator=random) + 0.5 if draw(st.booleans()) else None
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    queries = torch.randn(batch, key_heads * group, positions, dim, generator=random).to(dtype)
    return queries, quantize_kv(keys, values, factors), causal, draw(st.sampled_from([None, 1, 3]))


@pytest.mark.slow
def test_attention_is_near_the_reference_on_random_shapes(device: str, pytestconfig: pytest.Config) -> None:
    @settings(deadline=None, max_examples=pytestconfig.getoption("kernel_examples"))
    @given(problem=problems())
    def check(problem: tuple) -> None:
        assert_near_reference(device, *problem)

    check()


def test_the_reference_is_torchs_attention_on_dequantized_values() -> None:
    keys, values = torch.randn(2, 1, 2, 9, 32)
    cache, queries = quantize_kv(keys, values), torch.randn(1, 4, 9, 32)
    parts = (dequantize_heads(cache.keys, cache.key_scale), dequantize_heads(cache.values, cache.value_scale))
    wanted = F.scaled_dot_product_attention(queries, *parts, is_causal=True, enable_gqa=True)
    error = (kv_attention_reference(queries, cache) - wanted).norm() / wanted.norm()
    assert error < 0.05  # the queries' FP8


def test_a_cache_grows_by_what_it_would_have_held() -> None:
    keys, values = torch.randn(2, 2, 3, 10, 64)
    factors = torch.rand(3, 64) + 0.5
    whole = quantize_kv(keys, values, factors)
    grown = quantize_kv(keys[:, :, :7], values[:, :, :7], factors).extended(keys[:, :, 7:], values[:, :, 7:])
    assert all(torch.equal(*pair) for pair in zip(whole.stored(), grown.stored(), strict=True))
    assert whole.nbytes == 2 * 2 * 3 * 10 * (32 + 4)


def test_codes_use_their_range_and_are_half_a_step_off_at_most() -> None:
    x = torch.randn(1, 2, 5, 64)
    cache = quantize_kv(x, x)
    values = dequantize_heads(cache.keys, cache.key_scale)
    assert ((values - x).abs() <= cache.key_scale.unsqueeze(-1) / 2 * (1 + 1e-5)).all()
    torch.testing.assert_close(values.abs().amax(-1), x.abs().amax(-1))


def rotated(x: Tensor) -> Tensor:
    """Rotary embedding of (batch, heads, tokens, dim)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[2]).unsqueeze(1) * 10000.0 ** (-torch.arange(half) / half)
    first, second = x.chunk(2, -1)
    return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1)


def test_factors_before_rope_commute_with_it() -> None:
    keys, queries = torch.randn(1, 2, 12, 32).double(), torch.randn(1, 4, 12, 32).double()
    factors = pre_rope_factors(keys).double()
    by_query = factors.repeat_interleave(2, 0).unsqueeze(1)
    scores = rotated(queries) @ rotated(keys).repeat_interleave(2, 1).transpose(2, 3)
    scaled = rotated(queries / by_query) @ rotated(keys * factors.unsqueeze(1)).repeat_interleave(2, 1).transpose(2, 3)
    torch.testing.assert_close(scores, scaled)
    first, second = (rotated(keys) * factors.unsqueeze(1)).chunk(2, -1)
    radius = (first.square() + second.square()).sqrt().amax((0, 2))
    torch.testing.assert_close(radius, torch.full_like(radius, 8.0), rtol=1e-6, atol=0)


def test_folding_into_the_projections_leaves_scores_alone() -> None:
    query, key, x = torch.randn(4 * 32, 24).double(), torch.randn(2 * 32, 24).double(), torch.randn(1, 6, 24).double()

    def scores(query: Tensor, key: Tensor) -> Tensor:
        queries, keys = (F.linear(x, w).unflatten(-1, (-1, 32)).transpose(1, 2) for w in (query, key))
        return rotated(queries) @ rotated(keys).repeat_interleave(2, 1).transpose(2, 3)

    factors = pre_rope_factors(F.linear(x, key).unflatten(-1, (-1, 32)).transpose(1, 2)).double()
    torch.testing.assert_close(scores(query, key), scores(*fold_pre_rope(query, key, factors)))


def test_factors_after_rope_take_outliers_and_their_partners() -> None:
    keys = torch.rand(1, 1, 50, 32) + 0.1
    keys[..., 3] *= 100
    factors = post_rope_factors(keys, top=1)
    assert (factors != 1).nonzero()[:, 1].tolist() == [3, 19]
    torch.testing.assert_close((keys * factors.unsqueeze(1))[..., 3].amax(), torch.tensor(8.0))


def test_scaling_outlier_keys_lowers_the_error() -> None:
    torch.manual_seed(0)
    keys, values, queries = torch.randn(1, 2, 64, 64), torch.randn(1, 2, 64, 64), torch.randn(1, 4, 64, 64)
    keys[..., 5] *= 40
    queries[..., 5] /= 40
    wanted = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
    plain, scaled = (
        (kv_attention_reference(queries, quantize_kv(keys, values, factors)) - wanted).norm()
        for factors in (None, post_rope_factors(keys))
    )
    assert scaled < 0.6 * plain


def test_requests_the_kernel_does_not_run() -> None:
    cache = quantize_kv(*torch.randn(2, 1, 2, 5, 32))
    with pytest.raises(InvalidRequest, match=r"takes queries \(batch, heads, positions, 32\), not \(1, 2, 1, 16\)"):
        kv_attention(torch.zeros(1, 2, 1, 16), cache)
    with pytest.raises(InvalidRequest, match="3 query heads are no multiple of 2 key heads"):
        kv_attention(torch.zeros(1, 3, 1, 32), cache)
    with pytest.raises(InvalidRequest, match="6 positions need as many tokens in the cache, which has 5"):
        kv_attention(torch.zeros(1, 2, 6, 32), cache)
    with pytest.raises(InvalidRequest, match="heads of 32, 64, 128 or 256 channels, not 48"):
        kv_attention(torch.zeros(1, 2, 1, 48), quantize_kv(*torch.randn(2, 1, 2, 5, 48)))
    with pytest.raises(InvalidRequest, match="keys and values of one shape"):
        quantize_kv(torch.zeros(1, 2, 5, 31), torch.zeros(1, 2, 5, 31))


def test_an_empty_batch_gives_an_empty_result(device: str) -> None:
    cache = on(quantize_kv(*torch.randn(2, 0, 2, 5, 32)), device)
    assert kv_attention(torch.zeros(0, 2, 1, 32, device=device), cache).shape == (0, 2, 1, 32)
