"""Floating-point numbers of few bits against tables of all their codes, torch's types and numpy."""

from __future__ import annotations

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import InvalidRequest
from quantkit.formats import BLOCKS, Scheme, WeightFormat
from quantkit.numbers.kinds import rounded_weight, weight_of
from quantkit.numbers.minifloat import E2M1, E4M3, E5M2, Minifloat
from quantkit.numbers.minifloat_tokens import MinifloatTokens
from quantkit.numbers.packed_weight import pack_weight, stored_tensors, stored_weight
from quantkit.numbers.rounder import rounder
from quantkit.numbers.scales import ScaleGrid, exponents, of_exponents
from quantkit.ranges.minifloat_weights import FACTORS, POWERS, defined_scale, minifloat_scale
from quantkit.rounding import Moments
from quantkit.rounding.weights import quantize_weight

KINDS = {"e2m1": (E2M1, 2, 1, 1), "e4m3": (E4M3, 4, 3, 7), "e5m2": (E5M2, 5, 2, 15)}
TYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
ENDS = {"e2m1": 6.0, "e4m3": 448.0, "e5m2": 57344.0}
FORMATS = ("wfp8", "wfp8e5m2", "wfp8g8", "wfp8g8sf8", "wnvfp4", "wmxfp4")


def value(code: int, exponent: int, mantissa: int, bias: int) -> float:
    """What the bits of a code stand for, by the definition of IEEE 754; in E4M3 and E2M1 the top exponent is one as
    any other.
    """
    sign, power = code >> exponent + mantissa, code >> mantissa & (1 << exponent) - 1
    fraction = code & (1 << mantissa) - 1
    size = fraction / (1 << mantissa) * 2.0 ** (1 - bias) if power == 0 else None
    size = (1 + fraction / (1 << mantissa)) * 2.0 ** (power - bias) if size is None else size
    return -size if sign else size


def numbers_of(name: str) -> dict[int, float]:
    """Code -> number, of those that are finite in the format."""
    kind, exponent, mantissa, bias = KINDS[name]
    found = {code: value(code, exponent, mantissa, bias) for code in range(1 << kind.bits)}
    return {code: number for code, number in found.items() if abs(number) <= ENDS[name]}


def nearest_of(name: str, x: float) -> float:
    """By trying all numbers; ties to an even mantissa, what is beyond to the last."""
    return min(numbers_of(name).items(), key=lambda one: (abs(one[1] - x), one[0] & 1))[1]


@pytest.mark.parametrize("name", KINDS)
def test_every_code_is_the_number_of_its_bits(name: str) -> None:
    kind, table = KINDS[name][0], numbers_of(name)
    codes = torch.tensor(list(table), dtype=torch.uint8)
    assert kind.decode(codes).tolist() == list(table.values())
    assert len(table) == {"e2m1": 16, "e4m3": 254, "e5m2": 248}[name]
    back = kind.encode(kind.decode(codes))
    assert torch.equal(kind.decode(back), kind.decode(codes))
    others = [code for code, other in zip(codes.tolist(), back.tolist(), strict=True) if code != other]
    assert others == [1 << kind.bits - 1]  # minus zero
    if name in TYPES:
        assert torch.equal(codes.view(TYPES[name]).float(), kind.decode(codes))
    else:
        assert codes.numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float32).tolist() == list(table.values())


@pytest.mark.parametrize("name", KINDS)
def test_numbers_and_the_middles_between_them_round_as_by_trying_all(name: str) -> None:
    numbers = sorted(set(numbers_of(name).values()))
    middles = [(a + b) / 2 for a, b in itertools.pairwise(numbers)]
    around = [math.nextafter(m, side) for m in middles for side in (-math.inf, math.inf)]
    x = torch.tensor([*numbers, *middles, *around, 1e6, -1e6], dtype=torch.float64)
    assert KINDS[name][0].nearest(x).tolist() == [nearest_of(name, one) for one in x.tolist()]


@settings(deadline=None, max_examples=200)
@given(name=st.sampled_from(list(KINDS)), x=st.floats(-1e5, 1e5, width=32))
def test_any_float32_rounds_as_by_trying_all_and_as_torch_does(name: str, x: float) -> None:
    found = KINDS[name][0].nearest(torch.tensor([x]))
    assert float(found) == nearest_of(name, x)
    if name in TYPES and abs(x) <= ENDS[name]:
        assert torch.equal(found, torch.tensor([x]).to(TYPES[name]).float())


def test_powers_of_two_are_stored_as_their_exponents() -> None:
    stored = torch.arange(1, 255, dtype=torch.uint8)
    assert of_exponents(stored).tolist() == [2.0 ** (code - 127) for code in range(1, 255)]
    assert torch.equal(exponents(of_exponents(stored)), stored)
    assert stored.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32).tolist() == of_exponents(stored).tolist()


def by_hand(row: np.ndarray, format: WeightFormat) -> np.ndarray:
    """A block of a row in a format, in float64 and without the package: one number after the other."""
    largest = float(np.abs(row).max()) or 1.0
    if format.fmt == "mxfp4":
        scale = 2.0 ** (math.floor(math.log2(largest)) - 2)
    else:
        scale = float(np.float32(largest) / np.float32(ENDS["e2m1" if format.fmt == "nvfp4" else "e4m3"]))
    name = {"fp8": "e4m3", "fp8e5m2": "e5m2"}.get(format.fmt, "e2m1")
    return np.array([nearest_of(name, float(np.float32(x) / np.float32(scale))) * scale for x in row])


@pytest.mark.parametrize("text", ["wfp8", "wfp8g8", "wmxfp4"])
def test_weights_under_defined_scales_are_those_worked_out_number_by_number(text: str) -> None:
    format = Scheme.parse(text).weight
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)) * torch.tensor([[1e-3], [1.0], [300.0]])
    weight[0, :32] = 0
    blocks = weight.reshape(3, -1, format.group or 64)
    scale = defined_scale(blocks, format)
    codes = rounder(format)(blocks, scale, torch.zeros_like(scale)).reshape(3, 64)
    found = rounded_weight(codes, scale.squeeze(-1), torch.zeros(()), format).dequantize()
    wanted = np.stack([np.concatenate([by_hand(block, format) for block in row]) for row in blocks.numpy()])
    assert np.allclose(found.numpy(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("text", ["wnvfp4", "wmxfp4", "wfp8"])
def test_the_scale_found_errs_least_of_all_that_are_tried(text: str) -> None:
    format, draw = Scheme.parse(text).weight, torch.Generator().manual_seed(4)
    weight, importance = torch.randn(60, 32, generator=draw), torch.rand(60, 32, generator=draw)
    found = minifloat_scale(weight, format, importance)
    base = defined_scale(weight, format)
    grid = ScaleGrid.of(base, format)

    def error(scale: torch.Tensor) -> torch.Tensor:
        codes = rounder(format)(weight, scale, torch.zeros_like(scale))
        return ((codes * scale - weight).square() * importance).sum(-1, keepdim=True)

    factors = POWERS if format.scale == "e8m0" else FACTORS
    tried = torch.cat([error(grid.nearest(base * factor)) for factor in factors], -1)
    assert torch.equal(error(found), tried.amin(-1, keepdim=True))
    assert error(found).sum() < error(grid.nearest(base)).sum()


def test_blocks_of_nvfp4_err_no_more_than_with_the_number_of_a_tensor_that_its_authors_choose() -> None:
    """The float32 number of a tensor is a power of two here, that of the authors max |w| / (6 x 448)."""
    format = Scheme.parse("wnvfp4").weight
    weight = torch.randn(8, 16, 16, generator=torch.Generator().manual_seed(2)) * 0.02
    exact = defined_scale(weight, format)
    scale = ScaleGrid.of(exact, format).nearest(exact)
    assert ((scale - exact).abs() <= exact / 16 * (1 + 1e-6)).all()  # half a step of 3 bits of mantissa
    shared = float(weight.abs().max()) / (6 * 448)
    other = (exact / shared).to(torch.float8_e4m3fn).float() * shared
    ours, theirs = (float((E2M1.nearest(weight / s) * s - weight).norm()) for s in (scale, other))
    assert ours == pytest.approx(theirs, rel=0.02)
    packed = pack_weight(quantize_weight(weight.flatten(1), [format], rounding="nearest").weights[format])
    assert packed.scale.dtype == torch.float8_e4m3fn and math.log2(float(packed.shared_scale)).is_integer()


@settings(deadline=None, max_examples=60)
@given(
    text=st.sampled_from(FORMATS),
    shape=st.sampled_from([(3, 32), (1, 96), (5, 4, 4, 2), (2, 64)]),
    power=st.integers(-20, 10),
    seed=st.integers(0, 1000),
)
def test_weights_come_back_in_the_bytes_of_their_format(text: str, shape, power: int, seed: int) -> None:
    format = Scheme.parse(text).weight
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    found = quantize_weight(weight, [format], rounding="nearest").weights[format]
    tensors = stored_tensors(found, "a.weight")
    assert sum(t.nbytes for t in tensors.values()) == format.storage_bytes(shape)
    assert torch.equal(stored_weight(tensors, "a.weight", shape, format).dequantize(), found.dequantize())
    assert torch.equal(weight_of(found.to_dict()).dequantize(), found.dequantize())
    most = {"fp8": 0.04, "fp8e5m2": 0.08, "nvfp4": 0.2, "mxfp4": 0.2}[format.fmt]
    assert float((found.dequantize() - weight).norm() / weight.norm()) < most


def test_blocks_are_a_part_of_their_formats() -> None:
    for fmt, (group, scale) in BLOCKS.items():
        format = Scheme.parse(f"w{fmt}afp8d").weight
        assert (format.group, format.scale, str(format)) == (group, scale, f"w{fmt}")
        with pytest.raises(InvalidRequest, match=f"groups or scales of {fmt}, whose blocks of {group}"):
            Scheme.parse(f"w{fmt}g64")
    with pytest.raises(InvalidRequest, match=r"zero points of floating-point numbers"):
        Scheme.parse("wfp8z")


@pytest.mark.parametrize("fmt", ["fp8", "fp8e5m2"])
def test_tokens_are_scaled_to_the_largest_number_and_rows_of_zeros_stay(fmt: str) -> None:
    x = torch.randn(4, 5, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 5)[:, None]
    x[0, 0] = 0
    found, name = MinifloatTokens(fmt), {"fp8": "e4m3", "fp8e5m2": "e5m2"}[fmt]
    codes = found.quantize(x)
    assert float(codes.codes.abs().max()) == ENDS[name] and torch.isfinite(found.fake_quantize(x)).all()
    assert torch.equal(found.fake_quantize(x)[0, 0], torch.zeros(32))
    row, scale = x[1, 2], np.float32(x[1, 2].abs().max()) / np.float32(ENDS[name])
    wanted = [nearest_of(name, float(np.float32(v) / scale)) * scale for v in row.tolist()]
    assert found.fake_quantize(x)[1, 2].tolist() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("text", ["wnvfp4", "wmxfp4", "wfp8"])
def test_gptq_on_floating_point_numbers_errs_less_than_nearest_on_the_outputs(text: str) -> None:
    format, draw = Scheme.parse(text).weight, torch.Generator().manual_seed(0)
    weight = torch.randn(16, 64, generator=draw)
    x = torch.randn(512, 64, generator=draw) @ torch.randn(64, 64, generator=draw)
    moments = Moments((x.T @ x).double()[None])

    def error(rounding: str) -> float:
        found = quantize_weight(weight, [format], moments, 1, rounding).weights[format].dequantize()
        return float((x @ (found - weight).T).square().sum())

    assert error("gptq") < 0.7 * error("nearest")


def test_roundings_to_whole_numbers_refuse_other_ones() -> None:
    format = Scheme.parse("wfp8").weight
    with pytest.raises(InvalidRequest, match=r"rounding='hqq' computes whole numbers, .* wfp8 .* 'gptq'.* or 'auto'"):
        quantize_weight(torch.randn(4, 8), [format], rounding="hqq")


def test_a_minifloat_has_as_many_bits_as_it_says() -> None:
    assert [kind.bits for kind in (E2M1, E4M3, E5M2)] == [4, 8, 8]
    assert Minifloat(3, 2, 28.0).magnitudes.tolist()[-1] == 28.0  # E3M2 of the Microscaling formats
