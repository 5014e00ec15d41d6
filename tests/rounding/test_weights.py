"""A layer's codes per format: shapes, the best stretch of the range under GPTQ, and what happens without a usable
Hessian."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import Tensor

from quantkit.formats import Scheme, WeightFormat
from quantkit.numbers.uniform import quantize
from quantkit.ranges.weights import mse_range
from quantkit.rounding import gptq
from quantkit.rounding.gptq import STRETCH
from quantkit.rounding.moments import DAMPING, Moments
from quantkit.rounding.weights import Rounded, quantize_weight, rounding_note
from tests.rounding.test_gptq import obq_row, uneven_hessian

FORMATS = [Scheme.parse(text).weight for text in ("w2", "w4", "w8", "w3z", "w4g6", "w4g3z", "w5g18")]
SHAPES = {"linear": ((6, 18), 1), "conv": ((6, 2, 3, 3), 1), "grouped": ((6, 2, 3, 3), 3)}
every_format = pytest.mark.parametrize("format", FORMATS, ids=str)
every_shape = pytest.mark.parametrize(("shape", "groups"), SHAPES.values(), ids=SHAPES)


def random_weight(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_hessian(groups: int, size: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, 4 * size, size, generator=draw, dtype=torch.float64)
    x = x @ torch.randn(groups, size, size, generator=draw, dtype=torch.float64)
    return x.mT @ x


def output_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """Squared error of the layer's outputs on the inputs behind the Hessian."""
    error = (weight - rounded.double()).reshape(len(hessian), -1, hessian.shape[-1])
    return float(torch.einsum("goi,gij,goj->", error, hessian, error))


@every_format
@every_shape
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_codes_scales_and_zero_points_as_they_ship(
    format: WeightFormat, shape: tuple[int, ...], groups: int, rounding: str
) -> None:
    moments = Moments(random_hessian(groups, 18)) if rounding == "gptq" else None
    rounded = quantize_weight(random_weight(shape), [format], moments, groups)
    found, (low, high) = rounded.weights[format], format.code_range
    assert rounded.rounding == rounding
    assert rounded.damping == (DAMPING if rounding == "gptq" else 0.0)
    assert found.format == format
    assert found.codes.dtype == torch.int8 and found.codes.shape == shape
    assert low <= int(found.codes.min()) and int(found.codes.max()) <= high
    assert found.scale.dtype == torch.float32 and found.scale.shape == (6, 18 // (format.group or 18))
    if not format.zero_point:
        assert found.zero_point is None
        return
    assert found.zero_point is not None
    assert found.zero_point.dtype == torch.int8 and found.zero_point.shape == found.scale.shape
    assert low <= int(found.zero_point.min()) and int(found.zero_point.max()) <= high


@every_format
@every_shape
def test_nearest_is_nearest_in_every_group(format: WeightFormat, shape: tuple[int, ...], groups: int) -> None:
    weight = random_weight(shape)
    found = quantize_weight(weight, [format], groups=groups).weights[format]
    size = format.group or 18
    for row in range(6):
        for start in range(0, 18, size):
            part = weight.reshape(6, 18)[row, start : start + size]
            scale, zero = mse_range(part, format)
            codes = quantize(part, scale, zero, *format.code_range)
            assert torch.equal(found.codes.reshape(6, 18)[row, start : start + size], codes.to(torch.int8))
            assert found.scale[row, start // size] == scale.float()


def searched_row(
    row: np.ndarray, hessian: np.ndarray, scale: np.ndarray, zero: np.ndarray, format: WeightFormat
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of a row by OBQ, most active inputs first, under the best of scales around ``scale``."""
    order = np.argsort(-np.floor(16 * np.log2(hessian.diagonal())), kind="stable")
    damped = hessian + DAMPING * hessian.diagonal().mean() * np.eye(len(row))
    size, trials = len(row) // len(scale), []
    for factor in STRETCH.double().tolist():
        tried = scale * factor
        tried = tried.astype(np.float16).astype(tried.dtype) if format.scale == "f16" else tried
        codes, spread = np.zeros_like(row), np.repeat(tried, size)
        codes[order], loss = obq_row(
            row[order],
            damped[np.ix_(order, order)],
            spread[order],
            np.repeat(zero, size)[order],
            *format.code_range,
        )
        trials.append((loss, codes, tried))
    return min(trials, key=lambda trial: trial[0])[1:]


@every_format
@every_shape
def test_gptq_keeps_the_best_stretch_of_each_row(format: WeightFormat, shape: tuple[int, ...], groups: int) -> None:
    weight, hessian = random_weight(shape), uneven_hessian(groups, 18, 4)
    rows = weight.reshape(groups, -1, 18)
    groups_of_inputs = (-1, format.group or 18)
    squares = hessian.diagonal(dim1=-2, dim2=-1).unsqueeze(1).expand_as(rows).unflatten(-1, groups_of_inputs)
    start = mse_range(rows.unflatten(-1, groups_of_inputs), format, squares)
    scale, zero = (x.squeeze(-1).numpy() for x in start)
    found = quantize_weight(weight, [format], Moments(hessian), groups).weights[format]
    codes, scales = found.codes.reshape(rows.shape).numpy(), found.scale.reshape(scale.shape).numpy()
    for g, o in np.ndindex(*rows.shape[:2]):
        wanted = searched_row(rows[g, o].numpy(), hessian[g].numpy(), scale[g, o], zero[g, o], format)
        assert np.array_equal(codes[g, o], wanted[0])
        np.testing.assert_allclose(scales[g, o], wanted[1], rtol=1e-4)


def test_float32_finds_the_codes_of_float64() -> None:
    weight, hessian = random_weight((6, 2, 3, 3)), random_hessian(3, 18)
    double = quantize_weight(weight, FORMATS, Moments(hessian), 3)
    single = quantize_weight(weight.float(), FORMATS, Moments(hessian), 3)
    for format in FORMATS:
        same = double.weights[format].codes == single.weights[format].codes
        assert same.double().mean() > 0.97, str(format)  # a value on a tie tips now and then


@every_shape
def test_all_formats_at_once_are_those_found_alone(shape: tuple[int, ...], groups: int) -> None:
    weight, hessian = random_weight(shape), random_hessian(groups, 18)
    together = quantize_weight(weight, FORMATS, Moments(hessian), groups)
    for format in FORMATS:
        alone = quantize_weight(weight, [format], Moments(hessian), groups).weights[format]
        assert torch.equal(together.weights[format].codes, alone.codes)
        assert torch.equal(together.weights[format].scale, alone.scale)


@every_format
def test_slices_of_rows_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch, format: WeightFormat) -> None:
    weight, hessian = random_weight((7, 18)), random_hessian(1, 18)
    whole = quantize_weight(weight, [format], Moments(hessian)).weights[format]
    monkeypatch.setattr(gptq, "_ELEMENTS_AT_ONCE", 3 * 5 * 18)
    sliced = quantize_weight(weight, [format], Moments(hessian)).weights[format]
    assert torch.equal(whole.codes, sliced.codes) and torch.equal(whole.scale, sliced.scale)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("suffix", ["", "z", "g6"])
def test_gptq_gives_smaller_output_errors_than_nearest(bits: int, suffix: str) -> None:
    """In each of 5 random layers of 16 x 18 weights."""
    format = Scheme.parse(f"w{bits}{suffix}").weight
    for seed in range(5):
        weight, hessian = random_weight((16, 18), seed), random_hessian(1, 18, seed)
        by_gptq = quantize_weight(weight, [format], Moments(hessian)).weights[format].dequantize()
        by_nearest = quantize_weight(weight, [format]).weights[format].dequantize()
        assert output_error(weight, by_gptq, hessian) < output_error(weight, by_nearest, hessian), seed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_parameter_of_any_float_type_is_left_alone(dtype: torch.dtype) -> None:
    weight = torch.nn.Parameter(random_weight((4, 18)).to(dtype))
    before = weight.detach().clone()
    found = quantize_weight(weight, [FORMATS[2]], Moments(random_hessian(1, 18))).weights[FORMATS[2]]
    assert torch.equal(weight, before)
    assert not found.scale.requires_grad
    assert (found.dequantize() - before.float()).abs().max() < 0.2


def test_damping_that_was_needed_is_recorded() -> None:
    hessian = torch.tensor([[[1.0, 1.05], [1.05, 1.0]]], dtype=torch.float64)
    rounded = quantize_weight(random_weight((4, 2)), [FORMATS[1]], Moments(hessian))
    assert (rounded.rounding, rounded.damping) == ("gptq", pytest.approx(0.1))
    assert rounding_note("fc", rounded, "auto") == "gptq, damping 0.1"


def test_hessian_with_nan_falls_back_to_nearest_and_names_the_layer(caplog: pytest.LogCaptureFixture) -> None:
    weight, hessian = random_weight((6, 18)), random_hessian(1, 18)
    hessian[0, 3, 4] = torch.nan
    rounded = quantize_weight(weight, FORMATS, Moments(hessian))
    plain = quantize_weight(weight, FORMATS)
    assert (rounded.rounding, rounded.damping) == ("nearest", 0.0)
    assert all(torch.equal(rounded.weights[f].codes, plain.weights[f].codes) for f in FORMATS)
    with caplog.at_level(logging.WARNING, logger="quantkit"):
        assert rounding_note("blocks.3.fc", rounded, "auto") == "nearest"
    assert [r.getMessage() for r in caplog.records] == [
        "blocks.3.fc: the Hessian of its inputs is not known or cannot be factored; rounded to nearest"
    ]


@pytest.mark.parametrize(("rounding", "asked"), [("nearest", "nearest"), ("gptq", "auto"), ("gptq", "gptq")])
def test_no_warning_where_the_request_was_met(caplog: pytest.LogCaptureFixture, rounding: str, asked: str) -> None:
    with caplog.at_level(logging.WARNING, logger="quantkit"):
        note = rounding_note("fc", Rounded({}, rounding, DAMPING), asked)
    assert note.startswith(rounding) and not caplog.records
