"""Logarithmic codes: as many levels as bits allow, the same in both forms, products on integers alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantkit.numbers.logarithmic import LogRange
from quantkit.numbers.uniform import SiteRange


def slow_code(p: float, scale: float, bits: int) -> int:
    """By the definition, one number at a time: the nearest power of the square root of two, the last code for zero."""
    last = 2**bits - 2
    if p <= 0 or p / scale < 2 ** (-(last + 0.5) / 2):
        return last + 1
    return min(last, max(0, round(-2 * math.log2(p / scale))))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0.01, 1.0), st.integers(2, 6))
def test_codes_are_those_of_the_definition(values: list[float], scale: float, bits: int) -> None:
    found = LogRange(scale, bits)
    codes = found.quantize(torch.tensor(values, dtype=torch.float64)).codes
    assert codes.tolist() == [slow_code(p, scale, bits) for p in values]


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_powers_of_two_give_what_powers_of_the_square_root_give(bits: int) -> None:
    """RepQuant's reparameterization is exact: every code stands for the same number before and after it."""
    found = LogRange(0.7, bits)
    codes = torch.arange(found.high + 1, dtype=torch.float64)
    wanted = 0.7 * 2 ** (-codes / 2)
    wanted[-1] = 0
    values = found.values(codes)
    torch.testing.assert_close(values, wanted, rtol=1e-14, atol=1e-10)
    assert len(values.unique()) == 2**bits  # no level more than the bits hold
    assert torch.equal(found.quantize(values).codes, codes)


def test_all_codes_of_random_probabilities_are_equal_in_both_forms() -> None:
    found = LogRange(0.9, 4)
    p = torch.softmax(3 * torch.randn(50, 17, 17, dtype=torch.float64), -1)
    k = torch.round(-2 * torch.log2(p / 0.9)).clamp(0, 15)
    root = (0.9 * 2 ** (-k / 2)).masked_fill(k == 15, 0)
    assert torch.equal(found.quantize(p).codes, k)
    torch.testing.assert_close(found.fake_quantize(p), root, rtol=0, atol=1e-10)


def log_times_integer(codes: Tensor, found: LogRange, others: Tensor, site: SiteRange) -> Tensor:
    """The product of probabilities (..., M, K) with activations (..., K, N) from the codes of both, in float64: a
    shift for each power of two, one integer accumulator for even codes and one for odd ones, a multiplication at the
    end. What a kernel for such codes computes.
    """
    k, centred = codes.long(), others.long() - site.zero_point
    most = found.high // 2
    shifted = torch.where(k == found.high, 0, 1 << (most - (k + 1) // 2).clamp(min=0))
    even = torch.where(k % 2 == 0, shifted, 0) @ centred
    odd = torch.where(k % 2 == 1, shifted, 0) @ centred
    return found.scale * site.scale * 2.0**-most * (even.double() + math.sqrt(2) * odd.double())


@given(st.integers(0, 2**31), st.integers(2, 6))
def test_two_integer_accumulators_give_the_float_product(seed: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    found, site = LogRange(0.8, bits), SiteRange(0.03, 117)
    p = torch.softmax(4 * torch.randn(2, 5, 7, dtype=torch.float64, generator=generator), -1)
    v = torch.randn(2, 7, 3, dtype=torch.float64, generator=generator)
    powers, codes = found.quantize(p).codes, site.quantize(v).codes
    wanted = found.values(powers) @ ((codes - site.zero_point) * site.scale)
    product = log_times_integer(powers, found, codes, site)
    torch.testing.assert_close(product, wanted, rtol=0, atol=1e-10)


def test_gradients_pass_where_nothing_is_clipped() -> None:
    x = torch.tensor([0.0, 0.001, 0.3, 0.8, 0.99], requires_grad=True)
    LogRange(0.5).fake_quantize(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1, 1, 1, 0, 0]
