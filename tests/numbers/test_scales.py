"""Scales of groups are numbers of their type before codes are computed, whatever computes them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import InvalidRequest
from quantkit.formats import Scheme, WeightFormat
from quantkit.numbers.packed_weight import pack_weight, unpack_weight
from quantkit.numbers.scales import ScaleGrid, exact_power, per_tensor_power
from quantkit.reconstruction.learned import LearnedWeight
from quantkit.rounding import ROUNDINGS, Moments
from quantkit.rounding.weights import quantize_weight

# Every number of E4M3 with a positive sign: 4 bits of exponent around 7, 3 of mantissa, the last one is NaN
E4M3 = [2.0 ** max(e - 7, -6) * (m / 8 + (e > 0)) for e in range(16) for m in range(8) if (e, m) != (15, 7)]
GROUPED = [
    f"w{bits}g16{zero}{scale}" for bits in (2, 4, 8) for zero in ("", "z") for scale in ("", "sf8", "si8", "sf32")
]


def format_of(text: str) -> WeightFormat:
    found = Scheme.parse(text).weight
    assert found is not None
    return found


def nearest(values: list[float], x: float) -> float:
    """By trying all; ties to the even of two neighbours, which is that of an even place."""
    return values[min(range(len(values)), key=lambda i: (abs(values[i] - x), i % 2))]


@settings(deadline=None, max_examples=200)
@given(x=st.floats(2.0**-9, 448, width=32), power=st.integers(0, 14), sign=st.sampled_from([1.0, -1.0]))
def test_scales_of_8_bits_are_the_nearest_of_all(x: float, power: int, sign: float) -> None:
    found = ScaleGrid("f8", power).nearest(torch.tensor([sign * x / 2.0**power], dtype=torch.float64))
    assert float(found) * 2.0**power * sign == nearest(E4M3, x)


@settings(deadline=None, max_examples=200)
@given(x=st.floats(2.0**-24, 65504, width=32))
def test_scales_of_16_bits_are_those_of_numpy(x: float) -> None:
    assert float(ScaleGrid("f16").nearest(torch.tensor(x))) == float(np.float16(x))


def test_no_scale_becomes_zero_or_infinite() -> None:
    tiny, huge = torch.tensor([1e-30, -1e-30]), torch.tensor([1e30, -1e30])
    assert torch.equal(ScaleGrid("f16").nearest(tiny), torch.tensor([2.0**-24, -(2.0**-24)]))
    assert torch.equal(ScaleGrid("f8", 3).nearest(tiny), torch.tensor([2.0**-12, -(2.0**-12)]))
    assert torch.equal(ScaleGrid("f16").nearest(huge), torch.tensor([65504.0, -65504.0]))
    assert torch.equal(ScaleGrid("f8").nearest(huge), torch.tensor([448.0, -448.0]))
    for text in ("w4g16", "w4g16sf8", "w4g16si8", "w4g16z"):
        found = quantize_weight(torch.randn(4, 32) * 1e-12, [format_of(text)], rounding="nearest")
        assert torch.isfinite(found.weights[format_of(text)].dequantize()).all()


@pytest.mark.parametrize(("text", "largest"), [("w4g16", "65504"), ("w4g16sf8", "448")])
def test_weights_whose_scales_do_not_fit_are_refused(text: str, largest: str) -> None:
    with pytest.raises(InvalidRequest, match=f"Scales of {text} end at {largest}, .* Ask for float32 .*, w4g16sf32"):
        quantize_weight(torch.full((2, 16), 1e9), [format_of(text)], rounding="nearest")


@settings(deadline=None, max_examples=100)
@given(
    scales=st.lists(st.floats(2.0**-20, 60, width=32), min_size=1, max_size=8),
    top=st.sampled_from([1, 7, 8, 15, 255]),
    floor=st.sampled_from([2.0**-6, 2.0**-9]),
)
def test_the_power_of_a_tensor_is_that_of_a_loop(scales: list[float], top: int, floor: float) -> None:
    best = (math.inf, 0)
    for i in range(15):
        if any(s * 2.0**i * top > 448 for s in scales):
            break
        best = min(best, (sum(max(0.0, floor - s * 2.0**i) / floor for s in scales), i))
    assert per_tensor_power(torch.tensor(scales, dtype=torch.float64), top, floor) == best[1]


@settings(deadline=None, max_examples=100)
@given(power=st.integers(0, 14), picked=st.lists(st.sampled_from(E4M3[1:]), min_size=1, max_size=6))
def test_stored_scales_stand_for_the_same_products(power: int, picked: list[float]) -> None:
    """Packing takes the smallest power that will do; products with codes, rounded to E4M3, do not depend on it."""
    scale = torch.tensor(picked) / 2.0**power
    found = exact_power(scale)
    assert found is not None and found <= power
    codes = torch.arange(-8, 8.0).unsqueeze(-1)

    def products(i: int) -> torch.Tensor:
        rounded = (codes * scale * 2.0**i).clamp(-448, 448).to(torch.float8_e4m3fn).float() / 2.0**i
        return torch.where((codes * scale * 2.0**power).abs() > 448, torch.nan, rounded)

    assert torch.equal(products(found).nan_to_num(), products(power).nan_to_num())


@pytest.mark.parametrize("text", GROUPED)
@pytest.mark.parametrize("rounding", list(ROUNDINGS))
def test_every_rounding_computes_codes_of_scales_that_are_stored(rounding: str, text: str) -> None:
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 48, generator=draw) * 0.03, torch.randn(64, 48, generator=draw)
    moments = Moments((x.T @ x).double()[None])
    found = quantize_weight(weight, [format_of(text)], moments, 1, rounding).weights[format_of(text)]
    back = unpack_weight(pack_weight(found))
    assert torch.equal(back.dequantize(), found.dequantize())
    coarse = {"w2": 0.9, "w4": 0.25, "w8": 0.05}[text[:2]]
    assert float((back.dequantize() - weight).norm() / weight.norm()) < coarse
    if rounding == "nearest":  # no code next to one is nearer
        for step in (-1, 1):
            codes = (found.codes.int() + step).clamp(*found.format.code_range).to(torch.int8)
            other = found.dequantize(found.quantize(weight)._replace(codes=codes))
            assert ((other - weight).abs() >= (found.dequantize() - weight).abs() - 1e-7).all()


@pytest.mark.parametrize("text", ["w4g16", "w3g16zsf8", "w4g16zsi8"])
def test_learned_scales_are_stored_ones_and_learn_all_the_same(text: str) -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    start = quantize_weight(weight, [format_of(text)], rounding="nearest").weights[format_of(text)]
    learned = LearnedWeight(weight, start, None, torch.ones(4))
    assert torch.equal(learned.value(), start.dequantize())
    learned.value().square().sum().backward()
    assert (learned.log_factor.grad != 0).all()
    with torch.no_grad():
        learned.log_factor += 0.05
    found = learned.found()
    assert not torch.equal(found.scale, start.scale)
    assert torch.equal(unpack_weight(pack_weight(found)).scale, found.scale)
    assert torch.equal(found.dequantize(), learned.value())


@settings(deadline=None, max_examples=100)
@given(
    channel=st.lists(st.floats(2.0**-30, 2.0**20, width=32), min_size=1, max_size=6),
    signs=st.lists(st.sampled_from([1.0, -1.0]), min_size=6, max_size=6),
)
def test_whole_scales_of_a_channel_are_the_nearest_multiples_of_its_unit(channel, signs) -> None:
    scale = torch.tensor([channel]) * torch.tensor(signs[: len(channel)])
    found = ScaleGrid("i8").nearest(scale)
    unit = float(found.abs().max()) / 127
    assert float(torch.tensor(unit).bfloat16()) == unit and abs(unit * 127 / max(channel) - 1) < 2.0**-8
    multiples = [k * unit for k in range(1, 128)]
    assert found.abs()[0].tolist() == [min(multiples, key=lambda m: abs(m - x)) for x in channel]
    assert torch.equal(found.sign(), scale.sign()) and torch.equal(ScaleGrid("i8").nearest(found), found)


@pytest.mark.parametrize("text", ["w4g16sf8", "w4g16zsi8", "wnvfp4"])
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_groups_of_zeros_do_not_make_the_scales_of_others_coarse(text: str, rounding: str) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * 1e-4
    moments, format = Moments(torch.eye(64, dtype=torch.float64)[None]), format_of(text)
    plain = quantize_weight(weight, [format], moments, 1, rounding).weights[format].dequantize()
    weight[1, 16:32] = 0
    found = quantize_weight(weight, [format], moments, 1, rounding).weights[format].dequantize()
    assert torch.equal(found[1, 16:32], torch.zeros(16))
    others = weight != 0
    assert (found - weight)[others].norm() < 1.1 * (plain - weight)[others].norm()
