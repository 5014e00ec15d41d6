"""Weight ranges have the least squared error of their grid, and put the larger extreme on the longer side of the
codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.formats import Scheme, WeightFormat
from quantkit.numbers.uniform import dequantize, quantize
from quantkit.ranges import weights
from quantkit.ranges.weights import LONG, SHARES, group_ranges, mse_range, per_input, shares_tried

FORMATS = [Scheme.parse(text).weight for text in ("w2", "w3", "w4", "w8", "w2z", "w3z", "w4z", "w8z")]
every_format = pytest.mark.parametrize("format", FORMATS, ids=str)


def rows_of_many_kinds(seed: int = 0) -> Tensor:
    """Rows (12, 30), float64: normal, heavy-tailed, skewed, of one sign, sparse, and of very different sizes."""
    draw = torch.Generator().manual_seed(seed)
    normal = torch.randn(2, 30, generator=draw, dtype=torch.float64)
    sparse = normal * (torch.rand(2, 30, generator=draw) < 0.2)
    return torch.cat([normal, normal**3, normal.exp() - 1, normal.abs(), sparse, normal * 1e-6])


def error_of(row: np.ndarray, scale: float, zero: float, format: WeightFormat, importance: np.ndarray) -> float:
    low, high = format.code_range
    codes = np.clip(np.rint(row / scale) + zero, low, high)
    return float((importance * ((codes - zero) * scale - row) ** 2).sum())


def range_over(lowest: float, highest: float, format: WeightFormat) -> tuple[float, float]:
    """The scale and zero point whose codes just cover [lowest, highest]."""
    low, high = format.code_range
    if format.zero_point:
        scale = (highest - lowest) / (high - low) or 1.0
        return scale, low - round(lowest / scale)
    if -lowest >= highest:  # the negative side is the longer one: codes reach from low
        return max(-lowest / -low, highest / high) or 1.0, 0.0
    return -max(highest / -low, -lowest / high), 0.0


def searched(row: np.ndarray, format: WeightFormat, importance: np.ndarray) -> tuple[float, float, float]:
    """(error, scale, zero point) of the first best share of the range, widest first."""
    lowest, highest = min(row.min(), 0.0), max(row.max(), 0.0)
    found = []
    for share in SHARES:
        scale, zero = range_over(lowest * share, highest * share, format)
        found.append((error_of(row, scale, zero, format, importance), scale, zero))
    return min(found, key=lambda trial: trial[0])


@every_format
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_a_search_row_by_row(format: WeightFormat, weighted: bool) -> None:
    rows = rows_of_many_kinds()
    importance = torch.rand(rows.shape, generator=torch.Generator().manual_seed(1)).double() ** 4
    scale, zero = mse_range(rows, format, importance if weighted else None)
    assert scale.shape == zero.shape == (len(rows), 1)
    for i, row in enumerate(rows.numpy()):
        weights = importance[i].numpy() if weighted else np.ones_like(row)
        error, wanted_scale, wanted_zero = searched(row, format, weights)
        assert float(zero[i]) == wanted_zero
        assert float(scale[i]) == pytest.approx(wanted_scale, rel=1e-12)
        assert error_of(row, float(scale[i]), float(zero[i]), format, weights) == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize("format", [FORMATS[i] for i in (0, 2, 3, 6)], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_long_rows_are_searched_coarse_to_fine(format: WeightFormat, weighted: bool) -> None:
    draw = torch.Generator().manual_seed(2)
    rows = torch.randn(6, LONG, generator=draw, dtype=torch.float64)
    rows[3:] **= 3
    importance = torch.rand(1, LONG, generator=draw, dtype=torch.float64) ** 4 if weighted else torch.ones(1, LONG)
    found, wanted = [], []
    for row, scale, zero in zip(rows.numpy(), *mse_range(rows, format, importance), strict=True):
        found.append(error_of(row, float(scale), float(zero), format, importance[0].numpy()))
        wanted.append(searched(row, format, importance[0].numpy())[0])
    assert sum(found) == pytest.approx(sum(wanted), rel=2e-3)
    assert shares_tried(LONG) < 0.35


def test_large_weights_are_searched_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, importance = rows_of_many_kinds().reshape(2, 6, 3, 10), torch.rand(2, 1, 3, 10).double()
    whole = [mse_range(rows, format, given) for format in FORMATS for given in (None, importance)]
    monkeypatch.setattr(weights, "PIECE", 60)
    parts = [mse_range(rows, format, given) for format in FORMATS for given in (None, importance)]
    for one, other in zip(whole, parts, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@settings(deadline=None, max_examples=150)
@given(
    format=st.sampled_from(FORMATS),
    row=st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12),
)
def test_never_worse_than_the_range_that_clips_nothing(format: WeightFormat, row: list[float]) -> None:
    weight = torch.tensor([row], dtype=torch.float64)
    scale, zero = mse_range(weight, format)
    wide = range_over(min(0.0, *row, 0.0), max(0.0, *row, 0.0), format)
    ones = np.ones(len(row))
    found = error_of(weight[0].numpy(), float(scale), float(zero), format, ones)
    assert found <= error_of(weight[0].numpy(), *wide, format, ones) * (1 + 1e-9)


@every_format
def test_clipping_pays_at_few_bits(format: WeightFormat) -> None:
    """Gaussian rows at 4 bits and below are clipped, 8 bits hardly: the search does something."""
    rows = torch.randn(64, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale, _ = mse_range(rows, format)
    wide = torch.tensor([range_over(float(r.min()), float(r.max()), format)[0] for r in rows])
    ratio = float((scale.squeeze(1) / wide).mean())
    assert ratio < 0.95 if format.bits <= 4 else ratio > 0.9


@every_format
def test_rows_of_zeros_become_zeros(format: WeightFormat) -> None:
    weight = torch.zeros(3, 5)
    scale, zero = mse_range(weight, format)
    assert torch.equal(scale, torch.ones(3, 1))
    assert torch.equal(dequantize(quantize(weight, scale, zero, *format.code_range), scale, zero), weight)


@every_format
def test_zero_is_a_value_of_every_range(format: WeightFormat) -> None:
    scale, zero = mse_range(rows_of_many_kinds() + 0.3, format)
    low, high = format.code_range
    assert torch.isfinite(scale).all() and (scale != 0).all()
    assert ((zero >= low) & (zero <= high) & (zero == zero.round())).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rows_of_one_sign_use_the_longer_side_or_all_codes(bits: int) -> None:
    positive = torch.rand(8, 40, generator=torch.Generator().manual_seed(0)) + 0.1
    for rows, sign in ((positive, -1), (-positive, 1)):
        scale, zero = mse_range(rows, WeightFormat(str(bits)))
        assert torch.equal(scale.sign(), torch.full((8, 1), float(sign))) and zero.count_nonzero() == 0
        scale, zero = mse_range(rows, WeightFormat(str(bits), zero_point=True))
        end = WeightFormat(str(bits)).code_range[0 if sign < 0 else 1]
        assert torch.equal(zero, torch.full((8, 1), float(end))) and (scale > 0).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@settings(deadline=None, max_examples=50)
@given(
    large=st.floats(0.5, 2.0), ratio=st.floats(0, 1, exclude_max=True), positive=st.booleans(), inner=st.floats(-1, 1)
)
def test_larger_extreme_lies_on_the_longer_side(
    bits: int, large: float, ratio: float, positive: bool, inner: float
) -> None:
    sign = 1.0 if positive else -1.0
    weight = torch.tensor([[large, -large * ratio, inner * large * ratio]], dtype=torch.float64) * sign
    format = WeightFormat(str(bits))
    scale, zero = mse_range(weight, format)
    assert float(scale.sign()) == -sign
    assert (quantize(weight, scale, zero, *format.code_range)[0, 0] < 0).all()


def test_signed_scale_halves_the_error_of_skewed_rows_at_two_bits() -> None:
    """Codes -2..1: a row that reaches further up needs the negative scale."""
    rows = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    scale, zero = mse_range(rows, WeightFormat("2"))
    assert scale.item() == -1.0
    assert torch.equal(dequantize(quantize(rows, scale, zero, -2, 1), scale, zero), rows)


@every_format
def test_ties_keep_the_wider_range(format: WeightFormat) -> None:
    """Where no error counts, all shrinkages tie."""
    rows = rows_of_many_kinds()
    scale, zero = mse_range(rows, format, torch.zeros(1, rows.shape[1]).double())
    for i, row in enumerate(rows.numpy()):
        wanted_scale, wanted_zero = range_over(min(row.min(), 0.0), max(row.max(), 0.0), format)
        assert float(scale[i]) == pytest.approx(wanted_scale, rel=1e-15)
        assert float(zero[i]) == wanted_zero


@pytest.mark.parametrize("format", [f for f in FORMATS if f.bits < 8], ids=str)
def test_unimportant_outlier_does_not_widen_the_range(format: WeightFormat) -> None:
    rows = torch.randn(6, 30, generator=torch.Generator().manual_seed(0))
    rows[:, 7] = 6.0
    importance = torch.ones(1, 30)
    importance[:, 7] = 1e-6
    narrow, _ = mse_range(rows, format, importance)
    wide, _ = mse_range(rows, format)
    assert (narrow.abs() < wide.abs()).all()


def test_rows_are_independent() -> None:
    rows = rows_of_many_kinds()
    together = mse_range(rows.reshape(3, 4, 30), FORMATS[2])
    for i, row in enumerate(rows):
        alone = mse_range(row, FORMATS[2])
        assert all(torch.equal(t.reshape(12, 1)[i], a) for t, a in zip(together, alone, strict=True))


@every_format
def test_groups_have_ranges_of_their_own(format: WeightFormat) -> None:
    grouped, rows = WeightFormat(format.fmt, 5, format.zero_point), rows_of_many_kinds()[None]
    scale, zero = group_ranges(rows, grouped, torch.rand(1, 1, 30).double())
    assert scale.shape == zero.shape == (1, 12, 6)
    scale, zero = group_ranges(rows, grouped)
    for group in range(6):
        inside = slice(5 * group, 5 * group + 5)
        alone = mse_range(rows[..., inside], grouped)
        assert torch.equal(scale[..., group : group + 1], alone[0])
        assert torch.equal(per_input(zero, 30)[..., inside], alone[1].expand(1, 12, 5))
