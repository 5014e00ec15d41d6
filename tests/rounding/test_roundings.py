"""Every rounding that knows a layer's inputs lowers the error of its outputs, on every layer of three networks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantkit.formats import Scheme, WeightFormat
from quantkit.numbers.uniform import QuantizedWeight, dequantize, quantize
from quantkit.program.inputs import Batch
from quantkit.ranges.statistics import layer_hessians
from quantkit.ranges.weights import mse_range
from quantkit.rounding import AUTO, ROUNDINGS, Moments
from quantkit.rounding.gptaq import RIDGE, matched
from quantkit.rounding.hqq import POWER, hqq_range
from quantkit.rounding.weights import quantize_weight
from quantkit.simulation.model import SimulatedModel
from quantkit.targets import Target
from quantkit.transforms.prepare import Prepared, prepare
from tests.stages.networks import MobileNet, images, small
from tests.stages.test_reconstruct import digits

LEARNED = ("gptq", "adaround", "signround")


@cache
def network(name: str) -> tuple[Prepared, dict[str, Tensor]]:
    """A prepared network and the Hessians of its layers."""
    torch.manual_seed(0)
    if name == "digits":
        model, x = digits()[0], digits()[1][:96]
    elif name == "small":
        model, x = small(), images(48)
    else:
        model, x = MobileNet().eval(), torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    batches = [((x,), {})]
    ready = prepare(model, batches, Target.load("onnxruntime-cpu"))
    simulated = SimulatedModel(ready.model, (), {}, {})
    return ready, hessians_of(simulated, ready, batches)


def hessians_of(simulated: SimulatedModel, ready: Prepared, batches: list[Batch]) -> dict[str, Tensor]:
    found = layer_hessians(simulated, ready.program, ready.quantizable, batches)
    return {name: moments.hessian for name, moments in found.items()}


def rounded(ready: Prepared, name: str, hessian: Tensor, format: WeightFormat, rounding: str) -> QuantizedWeight:
    weight, groups = ready.weights[name], ready.weights.layers[name].groups
    found = quantize_weight(weight, [format], Moments(hessian), groups, rounding)
    assert found.rounding == rounding
    return found.weights[format]


def output_error(weight: Tensor, found: QuantizedWeight, hessian: Tensor) -> float:
    error = (weight - found.dequantize()).double().reshape(len(hessian), -1, hessian.shape[-1])
    return float(torch.einsum("goi,gij,goj->", error, hessian, error))


@pytest.mark.parametrize("rounding", LEARNED)
@pytest.mark.parametrize(("name", "text"), [("digits", "w2"), ("small", "w4"), ("depthwise", "w2")])
def test_the_output_error_is_below_nearest_on_every_layer(name: str, text: str, rounding: str) -> None:
    ready, hessians = network(name)
    format = Scheme.parse(text).weight
    for layer, hessian in hessians.items():
        weight = ready.weights[layer].detach()
        errors = [
            output_error(weight, rounded(ready, layer, hessian, format, way), hessian) for way in ("nearest", rounding)
        ]
        assert errors[1] < errors[0], layer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rounding"), [*(("resnet8_mlperf", rounding) for rounding in LEARNED), ("mobilenetv1_025_vww", "gptq")]
)
def test_and_on_trained_networks(name: str, rounding: str, data_dir: Path) -> None:
    from importlib import import_module

    recipe = import_module(f"recipes.models.{name.split('_')[0]}")
    model = recipe.build()
    model.load_state_dict(load_file(data_dir / f"{name}.safetensors"))
    file, array = ("vww_images.npz", "calib") if "vww" in name else ("cifar10_calib.npz", "images")
    batches = [((recipe.preprocess(np.load(data_dir / file)[array][:32]),), {})]
    ready = prepare(model, batches, Target.load("onnxruntime-cpu"))
    simulated = SimulatedModel(ready.model, (), {}, {})
    hessians, format = hessians_of(simulated, ready, batches), Scheme.parse("w3").weight
    for layer, hessian in hessians.items():
        weight = ready.weights[layer].detach()
        nearest, learned = (rounded(ready, layer, hessian, format, way) for way in ("nearest", rounding))
        assert output_error(weight, learned, hessian) < output_error(weight, nearest, hessian), layer


@pytest.mark.parametrize("text", ["w3", "w3z", "w3g6", "w2g3z"])
@pytest.mark.parametrize("rounding", [AUTO, *ROUNDINGS])
def test_codes_scales_and_zero_points_fit_their_format(rounding: str, text: str) -> None:
    draw, format = torch.Generator().manual_seed(0), Scheme.parse(text).weight
    weight = torch.randn(6, 2, 3, 3, generator=draw)
    x = torch.randn(1, 90, 18, generator=draw)
    found = quantize_weight(weight, [format], Moments((x.mT @ x).double()), 1, rounding).weights[format]
    low, high = format.code_range
    assert found.codes.shape == weight.shape and found.codes.dtype == torch.int8
    assert low <= int(found.codes.min()) and int(found.codes.max()) <= high
    assert found.scale.shape == (6, 18 // (format.group or 18)) and found.scale.dtype == torch.float32
    assert (found.zero_point is not None) == format.zero_point
    assert float((weight - found.dequantize()).norm() / weight.norm()) < 0.6


def test_the_matched_weight_is_where_the_error_with_its_ridge_is_least() -> None:
    draw = torch.Generator().manual_seed(0)
    y = torch.randn(80, 12, generator=draw, dtype=torch.float64)
    x = y + 0.3 * torch.randn(80, 12, generator=draw, dtype=torch.float64)
    weight = torch.randn(5, 12, generator=draw, dtype=torch.float64)
    hessian, cross = x.T @ x, y.T @ x
    found = matched(weight[None], hessian[None], cross[None])[0]
    ridge = RIDGE * hessian.diagonal().mean()
    gradient = (found @ x.T - weight @ y.T) @ x + ridge * (found - weight)
    assert float(gradient.abs().max()) < 1e-10
    assert float((weight @ y.T - found @ x.T).norm()) < float((weight @ y.T - weight @ x.T).norm())


def test_inputs_that_match_change_nothing() -> None:
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight, hessian = torch.randn(1, 4, 8, dtype=torch.float64), (x.T @ x)[None]
    assert torch.equal(matched(weight, hessian, hessian), weight)


NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "wide": lambda w: w,
    "tiny": lambda w: 1e-6 * w,
    "shifted": lambda w: w + 2,
}


@pytest.mark.parametrize("text", ["w4", "w3z", "w4g6z"])
@pytest.mark.parametrize("change", NORMS)
def test_hqq_lowers_the_error_in_its_own_norm(text: str, change: str) -> None:
    format = Scheme.parse(text).weight
    weight = torch.randn(30, format.group or 18, generator=torch.Generator().manual_seed(0))
    weight = NORMS[change](weight * weight.abs())  # heavy tails
    ranges = mse_range(weight, format)
    fitted = hqq_range(weight, format, *ranges)

    def error(scale: Tensor, zero: Tensor) -> Tensor:
        rounded = dequantize(quantize(weight, scale, zero, *format.code_range), scale, zero)
        return (weight - rounded).abs().double().pow(POWER).sum(-1)

    before, after = error(*ranges), error(*fitted)
    assert bool((after <= before * (1 + 1e-5)).all())
    assert float(after.sum()) < 0.995 * float(before.sum())
