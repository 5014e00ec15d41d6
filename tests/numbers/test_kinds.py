"""Every kind of quantized number keeps the protocol: values are those of codes, records and formats hold all of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantkit.errors import CorruptFile
from quantkit.formats import Scheme
from quantkit.numbers.half import HalfWeight
from quantkit.numbers.kinds import KINDS, AnyQuantizer, AnyRange, AnyWeight, from_dict, range_of, weight_of
from quantkit.numbers.logarithmic import LogRange
from quantkit.numbers.minifloat_tokens import MinifloatTokens
from quantkit.numbers.minifloat_weight import MinifloatWeight
from quantkit.numbers.per_token import TokenRange
from quantkit.numbers.uniform import QuantizedWeight, SiteRange
from quantkit.rounding.weights import quantize_weight
from tests.numbers.test_packing import random_codes

WIDTHS = st.integers(2, 8)
SCALES = st.floats(2**-10, 2**10, width=32)


@st.composite
def weights(draw: st.DrawFn) -> QuantizedWeight:
    format = Scheme.parse(f"w{draw(WIDTHS)}{draw(st.sampled_from(['', 'g3', 'z', 'g6z', 'sf16', 'g3zsf8']))}").weight
    assert format is not None
    shape = draw(st.sampled_from([(4, 12), (2, 3, 2, 2), (1, 12)]))
    scales, seed = (shape[0], 12 // (format.group or 12)), draw(st.integers(0, 1000))
    zero = random_codes(scales, format.bits, seed + 1) if format.zero_point else None
    scale = torch.rand(scales, generator=torch.Generator().manual_seed(seed)) + 0.1
    return QuantizedWeight(random_codes(shape, format.bits, seed), scale, zero, format)


@st.composite
def halves(draw: st.DrawFn) -> HalfWeight:
    seed, shape = draw(st.integers(0, 1000)), draw(st.sampled_from([(4, 12), (2, 3, 2, 2), (1, 12)]))
    return HalfWeight.of(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


@st.composite
def minifloats(draw: st.DrawFn) -> MinifloatWeight:
    format = Scheme.parse(draw(st.sampled_from(["wfp8", "wfp8e5m2g4", "wfp8g4sf8", "wnvfp4", "wmxfp4"]))).weight
    assert format is not None
    draws = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    weight = torch.randn(draw(st.sampled_from([(4, 32), (2, 4, 2, 4), (1, 96)])), generator=draws)
    found = quantize_weight(weight, [format], rounding="nearest").weights[format]
    assert isinstance(found, MinifloatWeight)
    return found


@st.composite
def uniform(draw: st.DrawFn) -> SiteRange:
    bits = draw(WIDTHS)
    return SiteRange(draw(SCALES), draw(st.integers(0, 2**bits - 1)), bits)


RANGES: dict[str, st.SearchStrategy[Any]] = {
    "uniform": uniform(),
    "logarithmic": st.builds(LogRange, SCALES, st.integers(2, 6)),
    "per-token": st.builds(TokenRange, WIDTHS),
    "minifloat-per-token": st.builds(MinifloatTokens, st.sampled_from(["fp8", "fp8e5m2"])),
}
DRAWN: dict[str, st.SearchStrategy[Any]] = {
    "weight": weights(),
    "minifloat": minifloats(),
    "float16": halves(),
    **RANGES,
}


def example_of(found: AnyQuantizer, seed: int) -> Tensor:
    """A tensor for a quantizer, several times wider than its codes reach where it has a scale."""
    x = torch.randn(found.shape if found.stored else (3, 5), generator=torch.Generator().manual_seed(seed))
    return x * 3 if found.stored else x * (getattr(found, "scale", 1.0) * 2**found.bits)


def same(a: AnyQuantizer, b: AnyQuantizer) -> bool:
    if isinstance(a, HalfWeight) and isinstance(b, HalfWeight):
        return torch.equal(a.values, b.values)
    if not (a.stored and b.stored):
        return a == b
    tensors = ((a.codes, b.codes), (a.scale, b.scale), (a.zero_point, b.zero_point))  # none of a minifloat
    return a.format == b.format and all(x is y is None or torch.equal(x, y) for x, y in tensors)


def test_every_kind_is_drawn_here() -> None:
    assert KINDS.keys() == DRAWN.keys()


@pytest.mark.parametrize("kind", [kind for kind in DRAWN if kind != HalfWeight.kind])
@given(data=st.data(), seed=st.integers(0, 1000))
def test_fake_quantized_values_are_those_of_the_codes(kind: str, data: st.DataObject, seed: int) -> None:
    found = data.draw(DRAWN[kind])
    x = example_of(found, seed)
    codes = found.quantize(x)
    assert torch.equal(found.fake_quantize(x), found.dequantize(codes))
    if kind == "minifloat-per-token":  # whose codes are the numbers themselves
        return
    assert torch.equal(codes.codes, codes.codes.float().round())
    assert int(codes.codes.max()) - int(codes.codes.min()) < 2**found.bits


@pytest.mark.parametrize("kind", DRAWN)
@given(data=st.data())
def test_a_record_is_the_same_quantizer(kind: str, data: st.DataObject) -> None:
    found = data.draw(DRAWN[kind])
    record = found.to_dict()
    assert record["kind"] == kind == found.kind
    read = from_dict(record)
    assert type(read) is type(found) and same(read, found)
    assert read.fingerprint() == found.fingerprint()


@given(st.one_of(weights(), minifloats(), halves()))
def test_a_weight_is_found_by_its_format(found: AnyWeight) -> None:
    record = {name: value for name, value in found.to_dict().items() if name != "kind"}
    assert same(weight_of(record), found)


@pytest.mark.parametrize("kind", RANGES)
@given(data=st.data())
def test_ranges_pass_through_json(kind: str, data: st.DataObject) -> None:
    found: AnyRange = data.draw(RANGES[kind])
    record = json.loads(json.dumps(found.to_dict()))
    assert range_of(record) == found


@pytest.mark.parametrize("kind", DRAWN)
@given(data=st.data(), seed=st.integers(0, 1000))
def test_gradients_pass_where_the_kind_does_not_clip(kind: str, data: st.DataObject, seed: int) -> None:
    found = data.draw(DRAWN[kind])
    x = example_of(found, seed).requires_grad_()
    found.fake_quantize(x).sum().backward()
    assert x.grad is not None and set(x.grad.unique().tolist()) <= {0.0, 1.0}
    if not found.clips:
        assert x.grad.min() == 1.0
    elif kind == "uniform":  # what has a code stays within half a step of it
        near = (found.fake_quantize(x) - x).abs() <= 0.499 * found.scale
        assert torch.all(x.grad[near] == 1.0)


@given(st.one_of(weights(), minifloats()))
def test_a_weight_has_the_codes_of_its_own_values(found: QuantizedWeight | MinifloatWeight) -> None:
    assert torch.equal(found.quantize(found.dequantize()).codes, found.codes)


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (SiteRange(0.1, 3, 4), "a4"),
        (TokenRange(8), "a8d"),
        (LogRange(0.5), "alog4"),
        (SiteRange(0.1, 3), "a8"),
        (MinifloatTokens("fp8"), "afp8d"),
        (MinifloatTokens("fp8e5m2"), "afp8e5m2d"),
    ],
)
def test_formats_are_those_of_schemes(found: AnyRange, text: str) -> None:
    assert str(found.format) == text
    assert Scheme.parse(text).activation == found.format


def test_a_record_of_an_unknown_kind_or_place_is_refused() -> None:
    with pytest.raises(
        CorruptFile, match=r"kind 'ternary' .* known: weight, minifloat, float16, uniform, logarithmic, per-token"
    ):
        from_dict({"kind": "ternary", "scale": 1.0})
    weight = QuantizedWeight(random_codes((2, 4), 4), torch.ones(2, 1), None, Scheme.parse("w4").weight)
    with pytest.raises(CorruptFile, match="A site has a quantizer of kind 'weight'"):
        range_of(weight.to_dict())
