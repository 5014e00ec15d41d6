"""The codes are those of onnxruntime and of a plain loop, and gradients pass where nothing was clipped."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnxruntime import InferenceSession
from torch import Tensor

from quantkit.formats import WeightFormat
from quantkit.numbers.uniform import QuantizedWeight, SiteRange, dequantize, fake_quantize, quantize

CODE_TYPES = {
    "int8": (TensorProto.INT8, -128, 127),
    "uint8": (TensorProto.UINT8, 0, 255),
    "int4": (TensorProto.INT4, -8, 7),
    "uint4": (TensorProto.UINT4, 0, 15),
}
SCALES = st.floats(2**-20, 2**20, width=32)


@cache
def onnx_session(code_type: str, axis: int) -> InferenceSession:
    """x, scale, zero -> (codes, values) by QuantizeLinear and DequantizeLinear."""
    kind, shape = CODE_TYPES[code_type][0], [None] if axis == 0 else []
    nodes = [
        helper.make_node("Cast", ["zero"], ["typed_zero"], to=kind),
        helper.make_node("QuantizeLinear", ["x", "scale", "typed_zero"], ["typed"], axis=axis),
        helper.make_node("Cast", ["typed"], ["codes"], to=TensorProto.INT32),
        helper.make_node("DequantizeLinear", ["typed", "scale", "typed_zero"], ["values"], axis=axis),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None]),
        helper.make_tensor_value_info("scale", TensorProto.FLOAT, shape),
        helper.make_tensor_value_info("zero", TensorProto.INT32, shape),
    ]
    outputs = [
        helper.make_tensor_value_info("codes", TensorProto.INT32, [None, None]),
        helper.make_tensor_value_info("values", TensorProto.FLOAT, [None, None]),
    ]
    graph = helper.make_graph(nodes, "codes", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def in_onnxruntime(x: Tensor, scale: Tensor, zero: Tensor, code_type: str) -> tuple[Tensor, Tensor]:
    session = onnx_session(code_type, 0 if scale.dim() else 1)
    codes, values = session.run(None, {"x": x.numpy(), "scale": scale.numpy(), "zero": zero.int().numpy()})
    return torch.from_numpy(codes), torch.from_numpy(values)


def assert_same_as_onnxruntime(x: Tensor, scale: Tensor, zero: Tensor, code_type: str) -> None:
    _, low, high = CODE_TYPES[code_type]
    wide = (scale, zero) if scale.dim() == 0 else (scale.unsqueeze(1), zero.unsqueeze(1))
    codes = quantize(x, *wide, low, high)
    wanted_codes, wanted_values = in_onnxruntime(x, scale, zero, code_type)
    assert torch.equal(codes.int(), wanted_codes)
    assert torch.equal(dequantize(codes, *wide), wanted_values)


@pytest.mark.parametrize("code_type", CODE_TYPES)
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_codes_and_values_are_those_of_onnxruntime(code_type: str, data: st.DataObject) -> None:
    _, low, high = CODE_TYPES[code_type]
    scale = torch.tensor(data.draw(SCALES))
    zero = torch.tensor(float(data.draw(st.integers(low, high))))
    near = st.floats(-300, 300, width=32).map(lambda v: v * float(scale))
    tie = st.integers(-600, 600).map(lambda v: v / 2 * float(scale))
    far = st.floats(-(2.0**100), 2.0**100, width=32)
    x = torch.tensor([data.draw(st.lists(near | tie | far, min_size=1, max_size=40))], dtype=torch.float32)
    assert_same_as_onnxruntime(x, scale, zero, code_type)


@pytest.mark.parametrize("code_type", CODE_TYPES)
def test_one_scale_per_channel_is_that_of_onnxruntime(code_type: str) -> None:
    _, low, high = CODE_TYPES[code_type]
    draw = torch.Generator().manual_seed(0)
    scale = torch.rand(16, generator=draw) + 0.01
    zero = torch.randint(low, high + 1, (16,), generator=draw).float()
    x = torch.randn(16, 500, generator=draw) * scale.unsqueeze(1) * (high - low)
    assert_same_as_onnxruntime(x, scale, zero, code_type)


def code_of(value: float, scale: float, zero: int, low: int, high: int) -> int:
    """The definition, one number at a time: Python's ``round`` rounds half to even."""
    return min(high, max(low, round(float(np.float32(value) / np.float32(scale))) + zero))


@settings(deadline=None, max_examples=100)
@given(bits=st.integers(2, 8), signed=st.booleans(), data=st.data())
def test_codes_of_every_width_are_those_of_a_loop(bits: int, signed: bool, data: st.DataObject) -> None:
    low = -(1 << bits - 1) if signed else 0
    high = low + (1 << bits) - 1
    scale, zero = data.draw(SCALES), data.draw(st.integers(low, high))
    values = data.draw(st.lists(st.floats(-600, 600, width=32).map(lambda v: v * scale / 2), min_size=1, max_size=30))
    found = quantize(torch.tensor(values), torch.tensor(scale), torch.tensor(float(zero)), low, high)
    assert found.tolist() == [code_of(v, scale, zero, low, high) for v in values]


def test_halves_go_to_the_even_neighbour_before_the_zero_point_is_added() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert quantize(x, torch.tensor(1.0), torch.tensor(0.0), -8, 7).tolist() == [-2, -2, 0, 0, 2, 2]
    assert quantize(x, torch.tensor(1.0), torch.tensor(1.0), -8, 7).tolist() == [-1, -1, 1, 1, 3, 3]


def test_codes_saturate() -> None:
    x = torch.tensor([-math.inf, -1e30, -129.0, 128.0, 1e30, math.inf])
    assert quantize(x, torch.tensor(1.0), torch.tensor(0.0), -128, 127).tolist() == [-128] * 3 + [127] * 3


@settings(deadline=None, max_examples=50)
@given(bits=st.integers(2, 8), zero=st.integers(0, 255), scale=SCALES)
def test_gradient_is_one_inside_the_range_and_zero_outside(bits: int, zero: int, scale: float) -> None:
    high = (1 << bits) - 1
    zero = min(zero, high)
    codes = torch.arange(-20, high + 21) - zero + 0.25  # a quarter step off: clear of rounding ties
    x = (codes * scale).requires_grad_()
    upstream = torch.linspace(-2, 3, len(codes))
    fake_quantize(x, torch.tensor(scale), torch.tensor(float(zero)), 0, high).backward(upstream)
    inside = [0 <= round(float(c)) + zero <= high for c in codes]
    assert sum(inside) == high + 1
    assert torch.equal(x.grad, torch.where(torch.tensor(inside), upstream, 0.0))


def test_fake_quantized_values_are_those_of_their_codes() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 3
    scale, zero = torch.tensor(0.03), torch.tensor(11.0)
    codes = quantize(x, scale, zero, 0, 255)
    assert torch.equal(fake_quantize(x, scale, zero, 0, 255), dequantize(codes, scale, zero))


@pytest.mark.parametrize("shape", [(6, 8), (6, 4, 2), (6, 2, 2, 2)])
@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("group", [0, 2, 4, 8])
def test_weight_values_are_those_of_a_loop(shape: tuple[int, ...], zero_point: bool, group: int) -> None:
    draw = torch.Generator().manual_seed(0)
    scales = 8 // (group or 8)
    codes = torch.randint(-8, 8, shape, generator=draw, dtype=torch.int8)
    scale = torch.randn(6, scales, generator=draw)
    zero = torch.randint(-8, 8, (6, scales), generator=draw, dtype=torch.int8)
    format = WeightFormat("4", group, zero_point)
    found = QuantizedWeight(codes, scale, zero if zero_point else None, format).dequantize()
    assert found.shape == shape
    flat = codes.reshape(6, 8)
    for row in range(6):
        for column in range(8):
            g = column // (group or 8)
            value = (int(flat[row, column]) - (int(zero[row, g]) if zero_point else 0)) * np.float32(scale[row, g])
            assert found.reshape(6, 8)[row, column] == np.float32(value)


def test_site_computes_as_onnxruntime_does() -> None:
    x = torch.randn(4, 200, generator=torch.Generator().manual_seed(0)) * 5
    site = SiteRange(0.037, 83)
    _, wanted = in_onnxruntime(x, torch.tensor(0.037), torch.tensor(83), "uint8")
    assert torch.equal(site.fake_quantize(x), wanted)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_site_has_as_many_values_as_codes(bits: int) -> None:
    x = torch.linspace(-300, 300, 5001, requires_grad=True)
    site = SiteRange(1.0, 1, bits)
    values = site.fake_quantize(x)
    assert values.unique().tolist() == list(range(-1, (1 << bits) - 1))
    values.sum().backward()
    assert 0 < x.grad.sum() < len(x)
