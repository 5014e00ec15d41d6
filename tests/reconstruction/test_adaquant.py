"""AdaQuant against its gradients written out in numpy, and what it does to every layer of three networks."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quantkit.formats import Scheme, WeightFormat
from quantkit.numbers.uniform import SiteRange
from quantkit.program.inputs import Batch
from quantkit.ranges.activations import mse_range
from quantkit.ranges.statistics import site_histograms
from quantkit.reconstruction.adaquant import Task, TaskCall, calls_of, learn_layer, learn_layers
from quantkit.reconstruction.data import Examples, FloatReference, ReconstructionData
from quantkit.reconstruction.learned import HALF
from quantkit.reconstruction.learning import Schedule, Training, shuffled
from quantkit.reconstruction.snapshot import Learned
from quantkit.rounding.weights import quantize_weight
from quantkit.simulation.model import SimulatedModel
from quantkit.simulation.playback import SimulatedProgram, copied_state, float_program, play, play_output
from quantkit.stages.recording import Recording, Replay, recording_of, replay_of
from quantkit.targets import Target
from quantkit.transforms.prepare import Prepared, prepare
from tests.stages.networks import ConvReused, MobileNet, images, small
from tests.stages.test_reconstruct import digits


def training(schedule: Schedule, seed: int = 0) -> Training:
    return Training(schedule, torch.Generator().manual_seed(seed), progress=False)


@dataclass
class Case:
    """A network with weights rounded to nearest, ready to be learned from its own inputs."""

    ready: Prepared
    recording: Recording
    runner: SimulatedProgram
    floats: SimulatedProgram
    reference: FloatReference
    data: ReconstructionData

    def learn(self, parallel: bool, schedule: Schedule) -> dict[str, Learned]:
        return learn_layers(
            self.runner, self.reference, self.data, self.recording.blocks, training(schedule), parallel
        )


def case_of(model: nn.Module, batch: Batch, format: WeightFormat, bits: int) -> Case:
    ready = prepare(model, [batch], Target.load("onnxruntime-cpu"))
    replay = replay_of(ready, [batch])
    assert isinstance(replay, Replay)
    recording = recording_of(ready, replay)
    state = copied_state(recording.program, ready.model)
    floats = float_program(ready.model, recording.program, state)
    inputs = recording.program.entering(ready.model, recording.samples[0])
    examples = Examples(inputs, recording.count)
    data = ReconstructionData(examples, examples)
    weights = {name: ready.weights[name].detach().clone() for name in ready.quantizable}
    spread = {name: torch.ones(len(ready.weights[name])) for name in ready.quantizable}
    reference = FloatReference(state, weights, spread, *[lambda a, b, c: a] * 3)
    histograms = site_histograms(ready.model, ready.sites, [batch], progress=False)
    simulated = SimulatedModel(ready.model, ready.sites, {}, {n: mse_range(h, bits) for n, h in histograms.items()})
    for name in ready.quantizable:
        weight, groups = ready.weights[name], ready.weights.layers[name].groups
        rounded = quantize_weight(weight, [format], groups=groups, rounding="nearest")
        simulated.set_weight(name, rounded.weights[format])
    return Case(ready, recording, SimulatedProgram(simulated, recording.program), floats, reference, data)


@dataclass
class Adam:
    """Adam, written out: betas 0.9 and 0.99, one tensor."""

    value: np.ndarray
    rate: float
    first: np.ndarray | float = 0.0
    second: np.ndarray | float = 0.0
    count: int = field(default=0)

    def move(self, gradient: np.ndarray, factor: float) -> None:
        self.count += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.99 * self.second + 0.01 * gradient**2
        mean, square = self.first / (1 - 0.9**self.count), self.second / (1 - 0.99**self.count)
        self.value = self.value - self.rate * factor * mean / (np.sqrt(square) + 1e-8)


class Twin:
    """A linear layer behind a site and before a ReLU, learned with gradients written out by hand, in float64."""

    def __init__(self, weight: np.ndarray, start: Any, bias: np.ndarray, site: SiteRange, schedule: Schedule) -> None:
        self.start, self.site, self.bias, self.schedule = start, site, bias, schedule
        self.low, self.high = start.format.code_range
        self.scale = start.scale.double().numpy()
        self.zero = np.zeros_like(self.scale) if start.zero_point is None else start.zero_point.double().numpy()
        codes = start.codes.double().numpy()
        code = codes + np.clip(weight / self.scale + self.zero - codes, -HALF, HALF)
        self.code = Adam(code, schedule.code_rate)
        self.log_scale = Adam(np.zeros_like(self.scale), schedule.scale_rate)
        self.zero_shift = Adam(np.zeros_like(self.scale), schedule.code_rate if start.zero_point is not None else 0.0)
        self.shift = Adam(np.zeros_like(bias), schedule.bias_rate)
        self.log_step = Adam(np.zeros(()), schedule.scale_rate)
        self.step_zero = Adam(np.zeros(()), schedule.code_rate)

    def numbers(self) -> dict[str, np.ndarray]:
        """Codes, scales, zero points and biases, and the site's step and zero point."""
        return {
            "codes": np.round(np.clip(self.code.value, self.low - HALF, self.high + HALF)),
            "scale": self.scale * np.exp(self.log_scale.value),
            "zero": np.clip(np.round(self.zero + self.zero_shift.value), self.low, self.high),
            "bias": self.bias + self.shift.value,
            "step": self.site.scale * np.exp(self.log_step.value),
            "step zero": np.clip(np.round(self.site.zero_point + self.step_zero.value), 0, self.site.high),
        }

    def learn(self, x: np.ndarray, wanted: np.ndarray, step: int) -> None:
        now, factor = self.numbers(), self.schedule.factor(step)
        codes = np.round(x / now["step"]) + now["step zero"]
        inside = (codes >= 0) & (codes <= self.site.high)
        read = (np.clip(codes, 0, self.site.high) - now["step zero"]) * now["step"]
        weight = (now["codes"] - now["zero"]) * now["scale"]
        made = np.maximum(read @ weight.T + now["bias"], 0)
        of_made = 2 * (made - wanted) / made.size / self.unit * (made > 0)
        of_weight, of_read = of_made.T @ read, of_made @ weight
        free = (self.code.value > self.low - HALF) & (self.code.value < self.high + HALF)
        self.code.move(of_weight * now["scale"] * free, factor)
        self.log_scale.move((of_weight * weight).sum(1, keepdims=True), factor)
        self.zero_shift.move(-(of_weight * now["scale"]).sum(1, keepdims=True), factor)
        self.shift.move(of_made.sum(0), factor)
        self.log_step.move((of_read * np.where(inside, read - x, read)).sum(), factor)
        self.step_zero.move(-(of_read * ~inside).sum() * now["step"], factor)


@pytest.mark.parametrize("text", ["w3", "w4", "w3z"])
def test_it_learns_what_gradients_written_out_by_hand_do(text: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(24, 30), nn.ReLU(), nn.Linear(30, 3)), torch.randn(64, 24)
    format, schedule = (
        Scheme.parse(text).weight,
        Schedule(steps=12, batch=64, code_rate=5e-3, checks=1),
    )
    case = case_of(model, ((x,), {}), format, 3)
    (call,) = calls_of(case.runner, case.recording.blocks[0], "0")
    assert call == TaskCall(0, 2, call.reads, call.makes, "input", call.place)
    wanted = torch.relu(model[0](x)).detach()
    task = Task(call, x, wanted, x, wanted)
    simulated = case.runner.model
    weight, bias = case.reference.state["0.weight"].numpy(), case.reference.state["0.bias"].numpy()
    twin = Twin(weight.astype(float), simulated.weights["0"], bias.astype(float), simulated.ranges["input"], schedule)
    twin.unit = float(wanted.double().var())
    for step, drawn in enumerate(shuffled(64, 64, 12, torch.Generator().manual_seed(5))):
        twin.learn(x[drawn].double().numpy(), wanted[drawn].double().numpy(), step)
    assert learn_layer(case.runner, case.reference, "0", lambda: [task], {"input"}, training(schedule, 5)).helped
    found, now, site = simulated.weights["0"], twin.numbers(), simulated.ranges["input"]
    assert np.array_equal(found.codes.numpy(), now["codes"])
    assert (
        now["codes"] != quantize_weight(case.reference.state["0.weight"], [format]).weights[format].codes.numpy()
    ).any()
    np.testing.assert_allclose(found.scale.numpy(), now["scale"], rtol=1e-4)
    np.testing.assert_allclose(simulated.model[0].bias.detach().numpy(), now["bias"], atol=1e-4)
    assert site.scale == pytest.approx(float(now["step"]), rel=1e-4) and site.zero_point == now["step zero"]
    if format.zero_point:
        assert np.array_equal(found.zero_point.numpy(), now["zero"])


@cache
def network(name: str, text: str, bits: int) -> tuple[nn.Module, Batch, WeightFormat, int]:
    torch.manual_seed(0)
    if name == "digits":
        model, x = digits()[0], digits()[1][:96]
    elif name == "small":
        model, x = small(), images(96)
    else:
        model, x = MobileNet().eval(), torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return model, ((x,), {}), Scheme.parse(text).weight, bits


def layer_errors(case: Case, batch: Batch) -> dict[str, float]:
    """The squared error of every layer's output behind its activation, on the float network's own inputs."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    own = case.runner.model.model
    rounded = {name: t.detach().clone() for name, t in own.state_dict().items()}
    for key, tensor in case.reference.state.items():
        own.get_parameter(key).data.copy_(tensor) if key in dict(own.named_parameters()) else None
    modules = {name: own.get_submodule(name) for name in case.ready.quantizable}
    hooks = [
        module.register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: (args[0].clone(), out.clone())})
        )
        for name, module in modules.items()
    ]
    with torch.no_grad():
        own(*batch[0])
    for hook in hooks:
        hook.remove()
    own.load_state_dict(rounded)
    errors = {}
    for name, (x, wanted) in seen.items():
        ranges = [case.runner.model.ranges[site] for site in case.ready.layers[name].inputs]
        with torch.no_grad():
            made = modules[name](ranges[0].fake_quantize(x))
        (call,) = (c for block in case.recording.blocks for c in calls_of(case.runner, block, name))
        both = (made, wanted) if call.stop == call.start + 1 else (made.relu(), wanted.relu())
        errors[name] = float((both[0] - both[1]).double().square().sum())
    return errors


@pytest.mark.parametrize(("name", "text", "bits"), [("digits", "w2", 8), ("small", "w3", 4), ("depthwise", "w4", 8)])
def test_the_output_error_is_below_nearest_on_every_layer(name: str, text: str, bits: int) -> None:
    model, batch, format, bits = network(name, text, bits)
    case = case_of(model, batch, format, bits)
    before = layer_errors(case, batch)
    learned = case.learn(True, Schedule(steps=100, batch=64, checks=20))
    after = layer_errors(case, batch)
    assert list(learned) == case.ready.quantizable and len(before) == len(learned)
    for layer, error in before.items():
        assert after[layer] < error, layer


@pytest.mark.parametrize("parallel", [False, True], ids=["sequential", "parallel"])
def test_sequential_makes_up_for_the_layers_before(parallel: bool) -> None:
    """Every layer's held-back error falls; in sequence it is measured on what the network quantized so far makes."""
    model, batch, format, bits = network("digits", "w2", 4)
    case = case_of(model, batch, format, bits)
    learned = case.learn(parallel, Schedule(steps=50, batch=64, checks=10))
    assert all(one.after < one.before for one in learned.values())
    block = case.recording.blocks[-1]
    held = case.data.held.inputs
    for passed in case.recording.blocks[:-1]:
        held = play(case.runner, held, passed)
    assert torch.isfinite(play_output(case.runner, held, block)).all()


def test_a_layer_that_runs_twice_is_learned_from_both_calls() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    case = case_of(ConvReused().eval(), ((x,), {}), Scheme.parse("w3").weight, 4)
    calls = [c for b in case.recording.blocks for c in calls_of(case.runner, b, "step")]
    assert len(calls) == 2 and len({call.site for call in calls}) == 2
    before = dict(case.runner.model.ranges)
    learned = case.learn(False, Schedule(steps=100, batch=64, checks=20))
    assert learned["step"].helped
    assert all(case.runner.model.ranges[call.site] != before[call.site] for call in calls)
