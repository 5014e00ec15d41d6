"""Rounding in sequence sees the network quantized so far; biases end on the grid an integer kernel adds them on."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantkit.formats import Scheme, WeightFormat
from quantkit.numbers.uniform import QuantizedWeight, SiteRange
from quantkit.program.inputs import Batch
from quantkit.program.intercept import OpKey
from quantkit.program.record import record
from quantkit.program.sites import Site
from quantkit.rounding.in_sequence import LARGEST_BIAS, round_biases, round_in_sequence
from quantkit.rounding.moments import Moments
from quantkit.rounding.request import RoundingRequest
from quantkit.rounding.weights import quantize_weight
from quantkit.simulation.model import SimulatedModel

FORMATS = {"0": "w3", "2": "w2", "4": "w4"}
SITES = (Site("input", OpKey("", "input")), Site("1", OpKey("1", "relu")), Site("3", OpKey("3", "relu")))
RANGES = {"input": SiteRange(0.4, 8, 4), "1": SiteRange(0.1, 0), "3": SiteRange(0.05, 0)}
INPUTS = {"0": ("input",), "2": ("1",), "4": ("3",)}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 14), nn.ReLU(), nn.Linear(14, 5)).eval()


@pytest.fixture
def batches() -> list[Batch]:
    draw = torch.Generator().manual_seed(1)
    mixing = torch.randn(12, 12, generator=draw)
    return [((torch.randn(64, 12, generator=draw) @ mixing,), {}) for _ in range(2)]


def formats(texts: Mapping[str, str]) -> dict[str, WeightFormat]:
    return {name: Scheme.parse(text).weight for name, text in texts.items()}


def requested(rounding: str = "auto") -> RoundingRequest:
    return RoundingRequest(formats(FORMATS), rounding, progress=False)


def in_sequence(batches: list[Batch], rounding: str = "auto") -> tuple[SimulatedModel, dict[str, str]]:
    model = network()
    simulated = SimulatedModel(model, SITES, {}, RANGES)
    how = round_in_sequence(simulated, record(model, batches[0]), batches, requested(rounding))
    return simulated, how


def by_hand(batches: list[Batch], quantized_so_far: bool = True) -> dict[str, QuantizedWeight]:
    """Each layer's codes from the inputs that the layers before it produce, quantized or as in the float network."""
    model, found = network(), {}
    x = torch.cat([batch[0][0] for batch in batches])
    for name, format in formats(FORMATS).items():
        layer = model.get_submodule(name)
        if quantized_so_far:
            x = RANGES[INPUTS[name][0]].fake_quantize(x)
        hessian = (x.T.double() @ x.double())[None]
        found[name] = quantize_weight(layer.weight, [format], Moments(hessian)).weights[format]
        with torch.no_grad():
            weight = found[name].dequantize() if quantized_so_far else layer.weight
            x = F.relu(F.linear(x, weight, layer.bias))
    return found


def test_each_layer_is_rounded_on_the_quantized_layers_outputs(batches: list[Batch]) -> None:
    simulated, how = in_sequence(batches)
    wanted = by_hand(batches)
    for name in FORMATS:
        assert torch.equal(simulated.weights[name].codes, wanted[name].codes), name
        torch.testing.assert_close(simulated.weights[name].scale, wanted[name].scale)
        assert torch.equal(simulated.model.get_submodule(name).weight, simulated.weights[name].dequantize())
    assert how == dict.fromkeys(FORMATS, "gptq, damping 0.01")


def test_inputs_of_the_float_network_would_give_other_codes(batches: list[Batch]) -> None:
    simulated, _ = in_sequence(batches)
    from_float = by_hand(batches, quantized_so_far=False)
    assert all(not torch.equal(simulated.weights[name].codes, from_float[name].codes) for name in FORMATS)


def test_nearest_needs_no_forward(batches: list[Batch]) -> None:
    model = network()
    structure = record(model, batches[0])
    simulated = SimulatedModel(model, SITES, {}, RANGES)
    model.register_forward_pre_hook(lambda _module, _args: pytest.fail("the model ran"))
    how = round_in_sequence(simulated, structure, batches, requested("nearest"))
    assert how == dict.fromkeys(FORMATS, "nearest")
    for name, format in formats(FORMATS).items():
        plain = quantize_weight(network().get_submodule(name).weight, [format]).weights[format]
        assert torch.equal(simulated.weights[name].codes, plain.codes)


def test_layer_without_a_usable_hessian_is_named_and_the_others_go_on(
    batches: list[Batch], caplog: pytest.LogCaptureFixture
) -> None:
    model = network()
    structure = record(model, batches[0])
    model[2].register_forward_hook(lambda _module, _args, output: output * torch.nan)
    simulated = SimulatedModel(model, (), {}, {})
    with caplog.at_level(logging.WARNING, logger="quantkit"):
        how = round_in_sequence(simulated, structure, batches, requested())
    assert [how[name].split(",")[0] for name in FORMATS] == ["gptq", "gptq", "nearest"]
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["4"]


def test_grouped_convolution_is_rounded_group_by_group() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)).eval()
    weight = model[0].weight.detach().clone()
    batch = (torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(0)),), {}
    simulated = SimulatedModel(model, (), {}, {})
    format = Scheme.parse("w3").weight
    round_in_sequence(simulated, record(model, batch), [batch], RoundingRequest({"0": format}, progress=False))
    for g in range(2):
        patches = F.unfold(batch[0][0][:, 2 * g : 2 * g + 2], 3).transpose(1, 2).reshape(-1, 18).double()
        alone = quantize_weight(weight[3 * g : 3 * g + 3], [format], Moments((patches.T @ patches)[None])).weights[
            format
        ]
        assert torch.equal(simulated.weights["0"].codes[3 * g : 3 * g + 3], alone.codes)


def bias_steps(simulated: SimulatedModel, name: str) -> Tensor:
    """A layer's bias in steps of input scale x weight scale, float64."""
    weight_scale = simulated.weights[name].scale.squeeze(1).double()
    scale = simulated.ranges[INPUTS[name][0]].scale
    return simulated.model.get_submodule(name).bias.detach().double() / (scale * weight_scale)


def test_biases_end_on_the_integer_grid_within_half_a_step(batches: list[Batch]) -> None:
    simulated, _ = in_sequence(batches)
    before = {name: simulated.model.get_submodule(name).bias.detach().clone() for name in FORMATS}
    exact = {name: bias_steps(simulated, name) for name in FORMATS}
    codes = {name: weight.codes for name, weight in simulated.weights.items()}
    round_biases(simulated, INPUTS)
    for name in FORMATS:
        steps = bias_steps(simulated, name)
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
        assert (steps - exact[name]).abs().max() <= 0.5 + 1e-4
        assert not torch.equal(simulated.model.get_submodule(name).bias, before[name])
        assert torch.equal(simulated.weights[name].codes, codes[name])


def test_layers_without_one_grid_keep_their_biases(batches: list[Batch]) -> None:
    """A layer reading two sites, one with a scale per group, and one without a bias."""
    model = network()
    model[4].bias = None
    simulated = SimulatedModel(model, SITES, {}, RANGES)
    for name, text in {"0": "w4", "2": "w4g4", "4": "w4"}.items():
        format = Scheme.parse(text).weight
        weight = quantize_weight(model.get_submodule(name).weight, [format]).weights[format]
        simulated.set_weight(name, weight)
    before = [model[0].bias.detach().clone(), model[2].bias.detach().clone()]
    round_biases(simulated, {"0": ("input", "1"), "2": ("1",), "4": ("3",)})
    assert torch.equal(model[0].bias, before[0]) and torch.equal(model[2].bias, before[1])


@pytest.mark.parametrize("text", ["w4", "w4z"])
@pytest.mark.parametrize("size", [1e-12, 1e-30, 1e-37])
def test_bias_of_a_channel_with_vanishing_weights_fits_in_32_bits(text: str, size: float) -> None:
    """As a BatchNorm gain near zero leaves it. Its codes are rounded again on the coarser grid, the others stay."""
    model, format = network(), Scheme.parse(text).weight
    with torch.no_grad():
        model[0].weight[1] *= size
        model[0].bias[1], model[0].bias[2] = 0.7, -0.3
    simulated = SimulatedModel(model, SITES, {}, RANGES)
    simulated.set_weight("0", quantize_weight(model[0].weight, [format]).weights[format])
    before = simulated.weights["0"]
    round_biases(simulated, INPUTS)
    after, steps = simulated.weights["0"], bias_steps(simulated, "0")
    assert steps.abs().max() <= LARGEST_BIAS * (1 + 1e-6)
    assert model[0].bias[1].item() == pytest.approx(0.7) and model[0].bias[2].item() == pytest.approx(-0.3, abs=0.05)
    others = [i for i in range(16) if i != 1]
    assert torch.equal(after.codes[others], before.codes[others])
    assert torch.equal(after.scale[others], before.scale[others])
    assert after.scale[1].abs() > before.scale[1].abs()
    assert (after.dequantize()[1] - before.dequantize()[1]).abs().max() <= 0.5 * after.scale[1].abs()
    assert torch.equal(model[0].weight, after.dequantize())
