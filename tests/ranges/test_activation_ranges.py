"""Activation ranges: the same for the same data however it arrives, zero always a value, and little error."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.numbers.uniform import SiteRange
from quantkit.ranges import activations as activation_ranges
from quantkit.ranges.activations import (
    BINS,
    OF_ZEROS,
    RANGES,
    Extremes,
    Histogram,
    minmax_range,
    mse_range,
    range_between,
)

TINY = torch.finfo(torch.float32).tiny
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)


def normal(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


DATA = {
    "normal": normal(5000),
    "relu": normal(5000).relu(),
    "heavy tails": normal(5000) ** 3,
    "one outlier": torch.cat([normal(5000), torch.tensor([80.0])]),
    "skewed": normal(5000).exp() - 1,
    "gelu": torch.nn.functional.gelu(normal(5000) * 2),
    "positive, far from zero": normal(5000).abs() + 3,
    "negative": -normal(5000).abs() - 0.1,
    "two clusters": torch.cat([normal(2500) * 0.1 - 2, normal(2500) * 0.1 + 5]),
}
every_data = pytest.mark.parametrize("x", DATA.values(), ids=DATA)
every_rule = pytest.mark.parametrize("rule", RANGES.values(), ids=RANGES)


def histogram_of(x: Tensor) -> Histogram:
    return Histogram.empty(Extremes().seen(x)).seen(x)


def squared_error(site: SiteRange, values: np.ndarray, counts: np.ndarray | float = 1.0) -> float:
    codes = np.clip(np.rint(values / site.scale) + site.zero_point, 0, site.high)
    return float((counts * ((codes - site.zero_point) * site.scale - values) ** 2).sum())


def histogram_error(site: SiteRange, histogram: Histogram) -> float:
    return squared_error(site, histogram.centres().numpy(), histogram.counts.numpy())


def searched_error(histogram: Histogram, bits: int) -> float:
    """The least error over all pairs of 50 lower and 50 upper bounds."""
    edges = histogram.extremes.with_zero()
    shrinks = np.linspace(1.0, 0.02, 50)
    return min(
        histogram_error(range_between(edges.low * a, edges.high * b, bits), histogram)
        for a in (shrinks if edges.low < 0 else [1.0])
        for b in (shrinks if edges.high > 0 else [1.0])
    )


@settings(deadline=None, max_examples=25)
@given(
    values=st.lists(FLOATS, min_size=1, max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=5),
    order=st.randoms(use_true_random=False),
)
def test_any_split_and_merge_order_gives_the_same_range(
    values: list[float], cuts: list[int], order: random.Random
) -> None:
    x = torch.tensor(values)
    parts = list(torch.tensor_split(x, sorted(cuts)))
    order.shuffle(parts)
    split = len(parts) // 2
    left, right = Extremes(), Extremes()
    for part in parts[:split]:
        left = left.seen(part)
    for part in parts[split:]:
        right = right.seen(part)
    extremes = right.merged(left)
    assert extremes == Extremes().seen(x) == Extremes(min(x.tolist()), max(x.tolist()))
    counted = [Histogram.empty(extremes).seen(part) for part in parts]
    while len(counted) > 1:
        counted.append(counted.pop(order.randrange(len(counted))).merged(counted.pop(order.randrange(len(counted)))))
    whole = histogram_of(x)
    assert torch.equal(counted[0].counts, whole.counts)
    for rule in RANGES.values():
        assert rule(counted[0], 8) == rule(whole, 8)


@every_data
def test_histogram_counts_every_value_once_where_it_lies(x: Tensor) -> None:
    histogram = histogram_of(x)
    assert histogram.counts.dtype == torch.int64 and int(histogram.counts.sum()) == x.numel()
    wanted, _ = np.histogram(x.double().numpy(), BINS, (float(x.min()), float(x.max())))
    moved = np.abs(np.cumsum(histogram.counts.numpy() - wanted)).max()
    assert moved <= 2  # a value on the edge of two bins
    width = (float(x.max()) - float(x.min())) / BINS
    assert histogram.centres()[0] == pytest.approx(float(x.min()) + width / 2)
    assert histogram.centres()[-1] == pytest.approx(float(x.max()) - width / 2)


def test_empty_tensors_change_nothing() -> None:
    x, nothing = DATA["normal"], torch.empty(0, 7)
    assert Extremes().seen(nothing) == Extremes()
    histogram = histogram_of(x)
    assert torch.equal(histogram.seen(nothing).counts, histogram.counts)


@every_rule
@pytest.mark.parametrize("bits", [2, 8])
def test_site_that_saw_nothing_or_only_zeros_keeps_zero(rule, bits: int) -> None:
    for histogram in (Histogram.empty(Extremes()), histogram_of(torch.zeros(10))):
        site = rule(histogram, bits)
        assert site == SiteRange(OF_ZEROS, 0, bits)
        assert site.fake_quantize(torch.zeros(3)).tolist() == [0.0] * 3


@every_rule
@pytest.mark.parametrize("value", [5.0, -0.3, 1e-20, 1e30])
def test_constant_is_represented_exactly(rule, value: float) -> None:
    x = torch.full((4,), value)
    site = rule(histogram_of(x), 8)
    torch.testing.assert_close(site.fake_quantize(x), x, rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=200)
@given(
    edges=st.tuples(FLOATS, FLOATS).map(sorted),
    bits=st.integers(2, 8),
)
def test_any_range_has_unsigned_codes_and_zero(edges: list[float], bits: int) -> None:
    low, high = edges
    site = range_between(low, high, bits)
    assert 0 <= site.zero_point <= site.high == 2**bits - 1
    assert site.scale >= TINY and site.scale == float(np.float32(site.scale))
    assert site.fake_quantize(torch.zeros(1)).item() == 0.0
    ends = torch.tensor([low, high])
    if max(high, 0) - min(low, 0) > TINY * site.high:
        error = (site.fake_quantize(ends).double() - ends.double()).abs().max()
        assert float(error) <= 0.51 * site.scale * (1 + 1e-5)  # the zero point is rounded: half a step at the ends


@every_rule
@every_data
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_point_lies_at_the_end_for_values_of_one_sign(rule, x: Tensor, bits: int) -> None:
    site = rule(histogram_of(x), bits)
    assert site.fake_quantize(torch.zeros(1)).item() == 0.0
    if x.min() >= 0:
        assert site.zero_point == 0
    elif x.max() <= 0:
        assert site.zero_point == site.high
    elif bits == 8:  # at fewer bits a short side may vanish
        assert 0 < site.zero_point < site.high


@every_data
def test_minmax_clips_nothing(x: Tensor) -> None:
    site = minmax_range(histogram_of(x), 8)
    assert (site.fake_quantize(x) - x).abs().max() <= 0.51 * site.scale
    assert site.scale == pytest.approx((max(float(x.max()), 0) - min(float(x.min()), 0)) / 255)


@every_rule
@pytest.mark.parametrize("largest", [1e-45, 1e-42, 1e-40, 200 * TINY])
@pytest.mark.parametrize("sign", [1, -1])
def test_range_below_the_normal_floats_is_constant_zero(rule, largest: float, sign: int) -> None:
    x = torch.linspace(0, largest, 50) * sign
    site = rule(histogram_of(x), 8)
    assert site == SiteRange(OF_ZEROS, 0, 8)
    assert site.fake_quantize(x).count_nonzero() == 0


@every_rule
def test_smallest_normal_scale_works(rule) -> None:
    x = torch.linspace(-1, 1, 500) * 300 * TINY
    site = rule(histogram_of(x), 8)
    assert site.scale >= TINY and 100 < site.zero_point < 155
    assert (site.fake_quantize(x) - x).abs().max() <= 1.01 * site.scale


@every_data
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mse_range_never_has_more_error_than_minmax(x: Tensor, bits: int) -> None:
    histogram = histogram_of(x)
    best, widest = mse_range(histogram, bits), minmax_range(histogram, bits)
    assert histogram_error(best, histogram) <= histogram_error(widest, histogram)
    values = x.double().numpy()
    assert squared_error(best, values) <= squared_error(widest, values) * 1.02  # bins stand for their values


@pytest.mark.parametrize("x", [DATA[n] for n in ("normal", "heavy tails", "one outlier", "skewed", "two clusters")])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mse_range_is_close_to_a_search_over_both_bounds(x: Tensor, bits: int) -> None:
    histogram = histogram_of(x)
    assert histogram_error(mse_range(histogram, bits), histogram) <= 1.1 * searched_error(histogram, bits)


def test_mse_range_clips_an_outlier() -> None:
    site = mse_range(histogram_of(DATA["one outlier"]), 4)
    assert site.scale * (site.high - site.zero_point) < 40  # of 80


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_range_scales_with_the_data(bits: int) -> None:
    """By a power of two all arithmetic scales exactly."""
    site = mse_range(histogram_of(DATA["skewed"]), bits)
    scaled = mse_range(histogram_of(DATA["skewed"] * 2.0**-40), bits)
    assert scaled.zero_point == site.zero_point and math.isclose(scaled.scale, site.scale * 2.0**-40)


@pytest.mark.parametrize("name", ["percentile", "entropy"])
@pytest.mark.parametrize("bits", [4, 8])
def test_rules_that_clip_leave_a_rare_outlier_out(name: str, bits: int) -> None:
    """One value in 20,000 lies forty times further out than the others: min-max spends its codes on the way there."""
    body = normal(20_000).clamp(-4, 4).relu()
    histogram = histogram_of(torch.cat([body, torch.tensor([160.0])]))
    clipped, widest = RANGES[name](histogram, bits), minmax_range(histogram, bits)
    assert clipped.scale * clipped.high < 0.5 * widest.scale * widest.high
    assert clipped.scale * clipped.high > 1.0


def test_a_percentile_leaves_out_that_share_on_either_side() -> None:
    x = torch.linspace(-3, 7, 100_000)
    found = RANGES["percentile"](histogram_of(x), 8)
    low, high = -found.zero_point * found.scale, (found.high - found.zero_point) * found.scale
    assert low == pytest.approx(-3, abs=2 * found.scale) and high == pytest.approx(7, abs=2 * found.scale)


def test_entropy_counts_what_is_lost_as_written_out() -> None:
    """Against the definition spelled bin by bin."""
    histogram = histogram_of(DATA["heavy tails"])
    site = range_between(-6.0, 9.0, 4)
    values, counts = histogram.centres().tolist(), histogram.counts.tolist()
    codes = [round(v / site.scale) + site.zero_point for v in values]
    inside = [i for i, code in enumerate(codes) if 0 <= code <= site.high]
    p = {i: float(counts[i]) for i in inside}
    groups = {code: [i for i in inside if codes[i] == code and counts[i]] for code in set(codes)}
    q = {i: sum(counts[j] for j in group) / len(group) for group in groups.values() for i in group}
    p[inside[0]] += sum(counts[: inside[0]])
    p[inside[-1]] += sum(counts[inside[-1] + 1 :])
    total_p, total_q = sum(p.values()), sum(q.values())
    smallest = min(v for v in p.values() if v) / total_p * 1e-3
    wanted = sum(
        v / total_p * math.log(v / total_p / max(q.get(i, 0.0) / total_q, smallest)) for i, v in p.items() if v
    )
    assert activation_ranges._lost_information(histogram, site) == pytest.approx(wanted, rel=1e-9)
