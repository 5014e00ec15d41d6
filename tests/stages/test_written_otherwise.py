"""Networks that name, order and feed their layers otherwise are rounded and learned like any other."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

import quantkit
from quantkit.budget import Budget
from quantkit.errors import InvalidRequest
from quantkit.program.segments import cuts_of
from quantkit.reconstruction.learning import LearningOptions, Schedule
from quantkit.rounding.by_layers import moments
from quantkit.simulation.model import SimulatedModel
from quantkit.simulation.playback import SimulatedProgram
from tests.program.models import randn
from tests.program.replays import program_of
from tests.rounding.test_rounding_by_layers import parts_of, recorded
from tests.stages.networks import ComputedWeights, small
from tests.stages.schedules import apply_with


def linears(count: int, width: int) -> nn.ModuleList:
    return nn.ModuleList([nn.Linear(width, width) for _ in range(count)])


class Named(nn.Module):
    """Every layer has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = linears(4, 8)
        self.a, self.b, self.c, self.d = self.layers

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.d(x)


class Tokens(nn.Module):
    """Inputs have no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layers = nn.Embedding(20, 16), linears(5, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for layer in self.layers:
            x = layer(x).relu()
        return x.mean(1)


class SequenceFirst(nn.Module):
    """The first dimension inside is the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = linears(5, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        for layer in self.layers:
            x = layer(x).relu()
        return x.transpose(0, 1).mean(1)


class Frames(nn.Module):
    """The first dimension inside is samples times frames."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.shape[1]
        x = self.two(self.one(x.flatten(0, 1)).relu()).relu().mean((2, 3))
        return self.head(x.unflatten(0, (-1, frames)).mean(1))


NETWORKS = {
    "two names": (Named, lambda: randn(80, 8)),
    "tokens": (Tokens, lambda: torch.randint(20, (80, 6), generator=torch.Generator().manual_seed(0))),
    "sequence first": (SequenceFirst, lambda: randn(80, 7, 16)),
    "as many tokens as samples": (SequenceFirst, lambda: randn(80, 64, 16)),
    "computed weights": (ComputedWeights, lambda: randn(80, 3, 8, 8)),
    "frames": (Frames, lambda: randn(80, 4, 3, 8, 8)),
}


SHORT = LearningOptions(
    network=Schedule(steps=60, batch=32, checks=12),
    block=Schedule(steps=30, batch=32, checks=6),
    layer=Schedule(steps=8, batch=32, checks=2),
)
apply = partial(apply_with, SHORT)
WAYS = [(case, how) for case in NETWORKS for how in ("block", "network", "adaquant")]


@pytest.mark.parametrize(("case", "how"), [*WAYS, ("two names", "adaquant-parallel"), ("frames", "adaquant-parallel")])
def test_every_layer_is_learned_that_can_be(case: str, how: str) -> None:
    build, inputs = NETWORKS[case]
    torch.manual_seed(0)
    model = build().eval()
    plan = {name: "w2a8" for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    found = {
        way: apply(model, plan, inputs(), reconstruction=way, correction=None, progress=False) for way in ("none", how)
    }
    learned = found[how].notes["reconstruction"]
    if how.startswith("adaquant"):
        expected = {"sequence first": 0, "as many tokens as samples": 0, "frames": 1}.get(case, len(plan))
        assert len(set(learned) & set(plan)) == expected  # the others have no row per sample
        return
    assert learned["network"].helped
    for name, weight in found["none"].quantized.weights.items():
        assert not torch.equal(weight.scale, found[how].quantized.weights[name].scale), name


def test_a_program_knows_which_values_have_a_row_per_sample() -> None:
    for case, cuts in (("two names", True), ("sequence first", True), ("frames", False)):
        build, inputs = NETWORKS[case]
        model, x = build().eval(), inputs()
        program = program_of(model, ((x[:8],), {}), ((x[8:16],), {}))
        assert program is not None
        layers = [i for i, step in enumerate(program.steps) if step.key.op == "linear" and step.key.scope != "head"]
        assert all((i in cuts_of(program)) == cuts for i in layers)
        assert {program.output, *program.inputs} <= program.rows.keys()


def test_all_frames_of_all_samples_are_rounded_on() -> None:
    x = randn(21, 4, 3, 8, 8)
    ready, program, segments = recorded(Frames().eval(), x)
    runner = SimulatedProgram(SimulatedModel(ready.model, (), {}, {}), program)
    found = moments(runner, segments[0], "one", parts_of(ready, program, x))
    windows = x.flatten(0, 1).unfold(2, 3, 1).unfold(3, 3, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 27).double()
    torch.testing.assert_close(found.hessian[0], windows.T @ windows, rtol=1e-4, atol=1e-2)


def test_corrections_of_layers_without_biases_leave_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False))
    result = apply(
        model, {"0": "w2a8", "2": "w2a8"}, randn(80, 8), reconstruction="none", correction="auto", progress=False
    )
    assert not any(step.helped for step in result.notes["correction"].values())


def test_asking_for_a_correction_starts_no_learning() -> None:
    result = apply(
        small(), {"head": "w8a8"}, randn(20, 2, 6, 6), reconstruction="auto", correction="bias", progress=False
    )
    assert "correction" in result.notes
    assert "reconstruction" not in result.notes


def test_a_model_that_is_one_layer_is_told_how_to_be_passed() -> None:
    with pytest.raises(InvalidRequest, match=r"single layer, which has no name: pass torch\.nn\.Sequential"):
        quantkit.profile(nn.Linear(5, 4), randn(20, 5), progress=False)
    assert quantkit.quantize(nn.Sequential(nn.Linear(5, 4)), "21 bits", randn(20, 5), progress=False).plan


class MaskedLogits(nn.Module):
    """Some classes are impossible."""

    def __init__(self, mask: float) -> None:
        super().__init__()
        self.body, self.mask = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6)), mask

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).masked_fill(x[:, :6] > 0.5, self.mask)


def test_impossible_classes_do_no_damage() -> None:
    found = {}
    for mask in (-float("inf"), -1e4, float("nan")):
        torch.manual_seed(0)
        model = MaskedLogits(mask).eval()
        if mask != mask:
            with pytest.raises(InvalidRequest, match="returns NaN on calibration inputs, in output"):
                quantkit.profile(model, randn(80, 8), progress=False)
            continue
        found[mask] = quantkit.profile(model, randn(80, 8), progress=False)
    assert found[-float("inf")].damage == pytest.approx(found[-1e4].damage)
    assert found[-float("inf")].damage.min() > 0


def test_a_limit_that_the_float_model_meets_is_refused_before_anything_is_measured(monkeypatch) -> None:
    monkeypatch.setattr("quantkit.stages.quantize.measure", lambda *a, **k: pytest.fail("measured"))
    with pytest.raises(InvalidRequest, match="nothing has to be quantized"):
        quantkit.quantize(small(), "activation_bytes=10 MB", randn(20, 2, 6, 6), progress=False)


class TiedNormed(nn.Module):
    """Norms, and a weight that is stored once and read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(16, 16), nn.GroupNorm(2, 16), nn.Linear(16, 16)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.norm(self.one(x)).relu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_percentage_is_one_of_the_float32_size(dtype: torch.dtype) -> None:
    profile = quantkit.profile(TiedNormed().to(dtype), randn(20, 16), progress=False)
    assert Budget(size="25%").limits(profile) == {"size": (16 * 16 + 4 * 16)}


class Attention(nn.Module):
    """Products of two tensors, which have sites of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys, self.head = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.queries(x) @ self.keys(x).transpose(1, 2)).softmax(-1)
        return self.head((weights @ x).mean(1))


def test_limits_that_depend_on_products_of_two_tensors_are_refused() -> None:
    torch.manual_seed(0)
    options = {"schemes": ["w4a4", "w8a4"], "progress": False}
    with pytest.raises(InvalidRequest, match=r"cannot tell yet what decides whether .* is quantized"):
        quantkit.quantize(Attention().eval(), "activation_bytes=100 B", randn(20, 6, 8), **options)
    assert quantkit.quantize(Attention().eval(), "30 bits", randn(20, 6, 8), **options).plan.sites
