"""Integer layers equal the definition bit for bit whatever holds their weight, in the bytes of its format."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from quantkit.errors import InvalidRequest
from quantkit.formats import Scheme
from quantkit.numbers.scales import ScaleGrid
from quantkit.numbers.uniform import QuantizedWeight, SiteRange
from quantkit.runtime.int_conv.layer import IntConv
from quantkit.runtime.int_conv.reference import int_conv_reference
from quantkit.runtime.int_linear import compiled
from quantkit.runtime.int_linear.held import HeldWeight
from quantkit.runtime.int_linear.layer import CENTRE, IntLinear, centred_codes, integer_offset
from quantkit.runtime.int_linear.reference import quantize_rows
from tests.numbers.test_packing import random_codes
from tests.runtime.twins import int_linear_reference


@pytest.fixture(params=["kernels", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the compiled kernels, and as if they were not installed."""
    if request.param == "torch":
        monkeypatch.setattr(compiled, "instruction_set", lambda: None)
    elif compiled.instruction_set() is None:
        pytest.skip("the compiled kernels are not installed")
    return request.param


def weight_of(format: str, shape: tuple[int, ...], seed: int = 0) -> QuantizedWeight:
    parsed = Scheme.parse(format).weight
    draw = torch.Generator().manual_seed(seed)
    scales = (shape[0], torch.Size(shape[1:]).numel() // (parsed.group or torch.Size(shape[1:]).numel()))
    zero = random_codes(scales, parsed.bits, seed + 1) if parsed.zero_point else None
    scale = torch.rand(scales, generator=draw) * 0.01
    scale = ScaleGrid.of(scale, parsed).nearest(scale)
    return QuantizedWeight(random_codes(shape, parsed.bits, seed), scale, zero, parsed)


FORMATS = [
    "w8",
    "w4",
    "w3",
    "w5",
    "w8g32",
    "w4g32",
    "w4g64",
    "w2g16",
    "w4g32sf8",
    "w3g16sf8",
    "w4g32sf32",
    "w4z",
    "w3g32z",
    "w8z",
]


@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(32, 128), (33, 64), (7, 128)])
def test_held_weights_multiply_as_the_reference(way: str, format: str, shape: tuple[int, int], expand: bool) -> None:
    weight = weight_of(format, shape)
    held = HeldWeight(weight, expand)
    stored = replace(weight.format, scale="f32") if held.in_panels else weight.format  # panels have float32 scales
    assert held.nbytes == stored.storage_bytes(shape)
    assert (held.expanded_bytes > 0) <= expand
    bias = torch.randn(shape[0])
    for rows in (0, 1, 5):
        given = quantize_rows(torch.randn(rows, shape[1]))
        wanted = int_linear_reference(given, weight.codes, weight.scale, weight.zero_point, None, bias)
        assert torch.equal(held(*given, None, bias), wanted)
    back = held.quantized()
    assert torch.equal(back.codes, weight.codes) and torch.equal(back.scale, weight.scale)


def test_weights_that_are_no_integers_are_refused() -> None:
    weight = QuantizedWeight(random_codes((4, 8), 8), torch.ones(4, 1), None, Scheme.parse("wfp8").weight)
    with pytest.raises(InvalidRequest, match="run weights of 2 to 8 bits, not wfp8"):
        HeldWeight(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lead", [(), (3,), (2, 0), (2, 3)])
def test_a_linear_layer_takes_any_leading_dimensions_and_type(way: str, dtype, lead: tuple[int, ...]) -> None:
    weight, bias = weight_of("w4g32", (16, 64)), torch.randn(16)
    x = torch.randn(*lead, 64).to(dtype)
    found = IntLinear(weight, bias)(x)
    assert found.dtype == dtype and found.shape == (*lead, 16)
    given = quantize_rows(x.reshape(-1, 64).float())
    wanted = int_linear_reference(given, weight.codes, weight.scale, bias=bias).reshape(*lead, 16)
    assert torch.equal(found, wanted.to(dtype))


def test_a_linear_layer_takes_inputs_in_any_order_of_memory(way: str) -> None:
    layer, x = IntLinear(weight_of("w4g32", (16, 64))), torch.randn(64, 5)
    assert torch.equal(layer(x.t()), layer(x.t().contiguous()))


def test_copies_of_a_linear_layer_have_a_weight_of_their_own(way: str) -> None:
    x, wanted = torch.randn(3, 64), IntLinear(weight_of("w4g32", (16, 64)))
    layer = copy.deepcopy(wanted)
    assert torch.equal(layer(x), wanted(x))
    layer.weight.codes.zero_()  # all codes -8
    assert not torch.equal(layer(x), wanted(x))
    assert torch.equal(copy.deepcopy(layer).cpu()(x), layer(x))


def test_a_linear_layer_is_near_its_float_twin(way: str) -> None:
    weight, x = weight_of("w4g32", (32, 256)), torch.randn(9, 256)
    wanted = x @ weight.dequantize().t()
    assert (IntLinear(weight)(x) - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("format", ["w8", "w4", "w3"])
def test_a_static_input_is_that_of_the_simulation(way: str, format: str) -> None:
    site, weight = SiteRange(0.02, 37), weight_of(format, (16, 64))
    x = torch.randn(50, 64) * 2
    bias = torch.round(torch.randn(16) / (site.scale * weight.scale[:, 0])) * site.scale * weight.scale[:, 0]
    wanted = F.linear(site.fake_quantize(x), weight.dequantize(), bias)
    torch.testing.assert_close(IntLinear(weight, bias, site)(x), wanted, atol=1e-5, rtol=1e-5)


def test_requests_an_integer_layer_cannot_meet() -> None:
    with pytest.raises(InvalidRequest, match="A static input needs a weight with one scale per channel"):
        IntLinear(weight_of("w4g32", (16, 64)), site=SiteRange(0.1, 0))
    with pytest.raises(
        InvalidRequest, match=r"reads floating-point rows of 64 inputs, not torch.float32 of shape \(3, 60\)"
    ):
        IntLinear(weight_of("w4", (16, 64)))(torch.zeros(3, 60))
    huge = torch.full((16,), 1e12)
    assert integer_offset(weight_of("w8", (16, 64)), huge, SiteRange(0.1, 0)) is None


@settings(deadline=None, max_examples=50)
@given(scale=st.floats(2**-10, 2**10, width=32), zero=st.integers(0, 255), bits=st.integers(2, 8))
def test_centred_codes_are_those_of_the_site(scale: float, zero: int, bits: int) -> None:
    site = SiteRange(scale, min(zero, (1 << bits) - 1), bits)
    draw = torch.Generator().manual_seed(zero)
    x = torch.cat([torch.randn(200, generator=draw) * 300, torch.arange(-300, 300) / 2, torch.tensor([1e30, -1e30])])
    codes = centred_codes(x.reshape(1, -1) * scale, site).float() + CENTRE - site.zero_point
    assert torch.equal(codes * torch.tensor(scale), site.fake_quantize(x.reshape(1, -1) * scale))


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Tensor, QuantizedWeight, Tensor | None, SiteRange, tuple]:
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    groups = draw(st.sampled_from([1, 1, 1, 2, 4]))
    per_group, channels = draw(st.integers(1, 9)), groups * draw(st.integers(1, 9))
    stride, dilation = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    padding = draw(st.sampled_from([0, 1, (2, 1), "valid", "same" if stride == 1 else 0]))
    size = draw(st.tuples(st.integers(5, 9), st.integers(5, 9)))
    seed = draw(st.integers(0, 10**6))
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(draw(st.integers(0, 3)), groups * per_group, *size, generator=random)
    if draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    weight = weight_of(f"w{draw(st.sampled_from([2, 3, 4, 8]))}", (channels, per_group, *kernel), seed)
    bias = torch.randn(channels, generator=random) if draw(st.booleans()) else None
    return x, weight, bias, SiteRange(0.03, draw(st.integers(0, 255))), (stride, padding, dilation, groups)


def check_convolution(case: tuple) -> None:
    x, weight, bias, site, options = case
    wanted = int_conv_reference(F.conv2d, x, site, weight, bias, *options)
    for expand in (False, True):
        layer = IntConv(weight, bias, site, expand)
        assert layer.weight_bytes == weight.format.storage_bytes(weight.codes.shape)
        assert torch.equal(layer(F.conv2d, x, *options), wanted)
        assert torch.equal(layer.quantized().codes, weight.codes)


@settings(deadline=None, max_examples=300)
@given(case=convolutions())
def test_convolutions_equal_the_reference(case: tuple) -> None:
    check_convolution(case)


@settings(deadline=None, max_examples=40)
@given(case=convolutions())
def test_the_reference_convolution_is_that_of_the_simulation(case: tuple) -> None:
    x, weight, bias, site, options = case
    if bias is not None:
        step = site.scale * weight.scale[:, 0]
        bias = torch.round(bias / step) * step
    found = int_conv_reference(F.conv2d, x, site, weight, bias, *options)
    wanted = F.conv2d(
        site.fake_quantize(x).double(), weight.dequantize().double(), bias if bias is None else bias.double(), *options
    )
    torch.testing.assert_close(found, wanted.float(), atol=1e-4, rtol=1e-4)


def test_sums_beyond_float32_are_exact() -> None:
    """576 inputs at full range pass 2^24: the reference changes to float64, the kernels never round."""
    weight = weight_of("w8", (16, 64, 3, 3))
    weight = QuantizedWeight(torch.full_like(weight.codes, -127), weight.scale, None, weight.format)
    site, x = SiteRange(1.0, 0), torch.full((1, 64, 3, 3), 255.0)
    x[0, 0, 0, 0] = 254
    assert int_conv_reference(F.conv2d, x, site, weight, None, 1, 0, 1, 1)[0, 0, 0, 0] == (
        torch.tensor(-float(127 * (255 * 576 - 1))) * weight.scale[0, 0]
    )
    check_convolution((x, weight, None, site, (1, 0, 1, 1)))


@pytest.mark.parametrize(
    ("convolve", "shape", "x"),
    [
        (F.conv1d, (16, 4, 3), (2, 4, 9)),
        (F.conv3d, (16, 4, 2, 2, 2), (2, 4, 3, 4, 5)),
        (F.conv2d, (16, 4, 3, 3), (4, 6, 6)),
    ],
)
def test_other_convolutions_run_through_the_reference(convolve, shape, x) -> None:
    site, weight, x = SiteRange(0.03, 100), weight_of("w8", shape), torch.randn(x)
    assert torch.equal(
        IntConv(weight, None, site)(convolve, x, 1, 1), int_conv_reference(convolve, x, site, weight, None, 1, 1)
    )


def test_the_reference_is_announced_once(caplog: pytest.LogCaptureFixture) -> None:
    layer = IntConv(weight_of("w8", (4, 1, 3, 3)), None, SiteRange(0.03, 100), name="body.0")
    with caplog.at_level(logging.INFO, logger="quantkit"):
        for _ in range(2):
            layer(F.conv2d, torch.randn(1, 4, 5, 5), 1, 1, 1, 4)
    assert [r.message for r in caplog.records] == [
        "Layer 'body.0': a convolution with 4 groups has no integer kernel here and runs on integers in float."
    ]


def test_many_images_are_convolved_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.runtime.int_conv.layer.WINDOW_BYTES", 5000)
    check_convolution(
        (torch.randn(5, 4, 6, 6), weight_of("w8", (16, 4, 3, 3)), None, SiteRange(0.03, 100), (1, 1, 1, 1))
    )
