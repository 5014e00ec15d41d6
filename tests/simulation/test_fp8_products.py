"""A simulated FireQ layer is what its kernel computes, step by step: a table of products in E4M3 for each group, FP8
activations with a scale for each token, sums, then the scales of tensor and token.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import quantkit
from quantkit import Result
from quantkit.errors import InvalidRequest
from quantkit.numbers.packed_weight import pack_weight
from quantkit.numbers.packing import unpack
from quantkit.numbers.uniform import QuantizedWeight
from quantkit.runtime.low_bit_matmul.weights import four_bit_weight
from tests.runtime.gpu.twins import weight_values

E4M3 = torch.float8_e4m3fn
INPUTS, OUTPUTS, GROUP = 256, 24, 128


def quantized(scheme: str, spread: float = 0.05, **options) -> tuple[Result, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUTS, OUTPUTS)).eval()
    nn.init.normal_(model[0].weight, std=spread)
    x = torch.randn(6, 5, INPUTS) * torch.logspace(-3, 3, 5)[:, None]
    x[0, 0] = 0
    x[1, 1, 7] = 3e38  # divided by 448 it is a number still
    options = {"target": "torch", "reconstruction": "none", "correction": "none", "progress": False} | options
    return quantkit.apply(model, {"0": scheme}, calibration=[x], loss="mse", **options), x


def kernel(weight: QuantizedWeight, x: Tensor, bias: Tensor) -> Tensor:
    """Code by code from the packed bytes, in float64 beside the FP8 numbers."""
    packed = pack_weight(weight)
    codes = unpack(packed.codes, 4, packed.shape).long().reshape(OUTPUTS, -1, GROUP)
    products = torch.arange(-8, 8).float() * packed.scale.float().unsqueeze(-1)
    table = products.clamp(-448, 448).to(E4M3)  # (channels, groups, 16)
    operand = table.float().gather(-1, codes + 8).reshape(OUTPUTS, INPUTS).to(E4M3)

    scale = (x.abs().amax(-1, keepdim=True) / 448).clamp(min=torch.finfo(torch.float32).tiny)
    tokens = (x / scale).clamp(-448, 448).to(E4M3)
    sums = tokens.double() @ operand.double().T
    return sums * scale.double() * float(packed.shared_scale) + bias.double()


@pytest.mark.parametrize("spread", [0.05, 0.001])
def test_simulated_layers_are_those_of_the_kernel(spread: float) -> None:
    result, x = quantized("w4g128sf8afp8d", spread)
    weight, bias = result.simulated().weights["0"], result.simulated().floats.bias("0")
    found, wanted = result.model(x).detach(), kernel(weight, x, bias.detach())
    assert torch.isfinite(found).all()
    rows = wanted.abs().amax(-1, keepdim=True)
    assert ((found.double() - wanted).abs() <= 1e-5 * rows).all()
    assert torch.equal(found[0, 0], bias.detach())


def test_products_are_rounded_where_fp8_activations_meet_them_alone() -> None:
    result, _ = quantized("w4g128sf8afp8d")
    weight = result.simulated().weights["0"]
    assert weight.in_fp8
    assert torch.equal(weight.dequantize() * 2**9, (weight.dequantize() * 2**9).to(E4M3).float())
    operands = four_bit_weight(weight, fp8=True)
    assert torch.equal(weight_values(operands) * operands.tensor_scale, weight.dequantize())

    alone, _ = quantized("w4g128sf8")
    exact = alone.simulated().weights["0"]
    assert not exact.in_fp8 and torch.equal(exact.codes, weight.codes)
    assert not torch.equal(exact.dequantize(), weight.dequantize())
    assert torch.equal(exact.dequantize(), exact.codes * exact.scale.repeat_interleave(GROUP, 1))


def test_products_are_rounded_again_after_saving(tmp_path: Path) -> None:
    result, x = quantized("w4g128sf8afp8d")
    result.save(tmp_path)
    again = quantkit.load(tmp_path, nn.Sequential(nn.Linear(INPUTS, OUTPUTS)).eval())
    assert again.simulated().weights["0"].in_fp8
    assert torch.equal(again.model(x), result.model(x))


@pytest.mark.parametrize("scheme", ["w4g64a8d", "w4g128za8d", "w3g64a8"])
def test_groups_meet_codes_of_activations_in_the_simulation(scheme: str) -> None:
    """Integer kernels on this CPU run them too, from packed weights."""
    result, x = quantized(scheme)
    x = x[:, 1:3, :].clamp(-10, 10)
    assert torch.allclose(result.to_real().model(x), result.model(x), rtol=1e-4, atol=1e-5)


def test_onnxruntime_has_no_fp8_activations_and_the_simulation_no_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"f8 scales|weight groups \(w4g128sf8\) are not supported by .*cpu yet"):
        quantized("w4g128sf8afp8d", target="onnxruntime-cpu")
    with pytest.raises(InvalidRequest, match="Target torch reads no files, so that there is none to write"):
        quantized("w4g128sf8afp8d")[0].export_onnx(tmp_path / "m.onnx")
    with pytest.raises(InvalidRequest, match="Target torch reads no files"):
        quantkit.quantize(
            nn.Sequential(nn.Linear(64, 64)), quantkit.Budget(file_size="10 KB"), [torch.randn(4, 64)],
            target="torch", schemes=["w4", "w8"], loss="mse", progress=False,
        )  # fmt: skip
