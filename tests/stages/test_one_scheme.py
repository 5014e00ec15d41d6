"""A scheme as the whole request: every layer that can gets it, nothing is profiled, and what stays float says why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import quantkit
from quantkit.errors import AccuracyNotMet, InfeasibleBudget, InvalidRequest
from quantkit.stages import profile as first_stage
from quantkit.stages import quantize as whole
from quantkit.stages.request import make_ready
from tests.program.models import randn, settled
from tests.stages.networks import images, small

QUICK = {"progress": False, "reconstruction": "none", "correction": None}


@pytest.fixture(autouse=True)
def nothing_is_profiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        pytest.fail("something was profiled")

    monkeypatch.setattr(first_stage, "_measure", fail)
    monkeypatch.setattr(whole, "announced_evaluator", fail)


class Mixed(nn.Module):
    """A convolution, a transposed one, which the target does not run on integers, and a head of two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.hidden, self.head = nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, x):
        x = self.up(torch.relu(self.stem(x)))
        return self.head(torch.relu(self.hidden(x.mean((2, 3)))))


def mixed() -> nn.Module:
    torch.manual_seed(3)
    return settled(Mixed())


@pytest.mark.parametrize("scheme", ["w8a8", "w5a8", "w4"])
def test_every_layer_gets_it_as_a_mapping_would(scheme: str) -> None:
    made = quantkit.quantize(small(), scheme, images(), **QUICK)
    mapped = quantkit.apply(small(), dict.fromkeys(made.plan.schemes, scheme), images(), **QUICK)
    assert {str(s) for s in made.plan.schemes.values()} == {scheme}
    assert made.plan.digest() == mapped.plan.digest()
    assert torch.equal(made.model(images(4, seed=5)), mapped.model(images(4, seed=5)))
    assert (made.profile, made.plan.predicted_damage) == (None, None)
    assert made.plan.provenance["budget"] == scheme


@pytest.mark.parametrize("budget", ["9 bits", "2.5 KB", "9 bits, 2.5 KB", "bops=7%"])
def test_one_candidate_is_checked_against_the_budget_and_applied(budget: str) -> None:
    made = quantkit.quantize(small(), budget, images(), schemes=["w8a8"], **QUICK)
    assert {str(s) for s in made.plan.schemes.values()} == {"w8a8"}
    blank = make_ready(small(), images(), schemes=["w8a8"]).unmeasured()
    assert made.plan.provenance["limits"] == quantkit.Budget.parse(budget).limits(blank)


@pytest.mark.parametrize("budget", ["8 bits", "w8a8, 8 bits", {"scheme": "w8a8", "size": "1 KB"}], ids=str)
def test_a_limit_beside_the_only_candidate_is_checked(budget: Any) -> None:
    schemes = ["w8a8"] if budget == "8 bits" else None
    with pytest.raises(InfeasibleBudget, match="the smallest that can be reached is"):
        quantkit.quantize(small(), budget, images(), schemes=schemes, **QUICK)


def test_rules_override_it_and_kinds_that_cannot_stay_float_with_the_reason() -> None:
    made = quantkit.quantize(mixed(), "w8a8", randn(8, 2, 6, 6), rules={"hidden": "w4a8", "head": "float"}, **QUICK)
    assert {n: str(s) for n, s in made.plan.schemes.items()} == {
        "stem": "w8a8", "up": "w8", "hidden": "w4a8", "head": "float"
    }  # fmt: skip
    assert made.plan.why["head"].startswith("float: kept float by a rule")


def test_a_plan_with_weights_alone_where_nothing_else_can_be_is_applied_again() -> None:
    made = quantkit.quantize(mixed(), "w8a8", randn(8, 2, 6, 6), **QUICK)
    assert {str(s) for s in made.plan.schemes.values()} == {"w8", "w8a8"}
    again = quantkit.apply(mixed(), made.plan, randn(8, 2, 6, 6), progress=False)
    assert again.plan.schemes == made.plan.schemes


def test_layers_that_cannot_read_tokens_stay_float_unless_they_were_named() -> None:
    made = quantkit.quantize(mixed(), "w8a8d", randn(8, 2, 6, 6), **QUICK)
    assert {n: str(s) for n, s in made.plan.schemes.items()} == {
        "stem": "float", "up": "w8", "hidden": "w8a8d", "head": "w8a8d"
    }  # fmt: skip
    assert "does not quantize what conv2d layers read token by token (w8a8d)" in made.plan.why["stem"]
    with pytest.raises(InvalidRequest, match="'stem' is a conv2d layer, and w8a8d quantizes inputs token by token"):
        quantkit.quantize(mixed(), "w8a8d", randn(8, 2, 6, 6), rules={"stem": "w8a8d"}, **QUICK)


def test_groups_that_do_not_divide_a_layer_leave_it_float() -> None:
    """No target can run groups yet, so a target is made up that does; it stops where they would be written."""
    target = replace(quantkit.Target.load("onnxruntime-cpu"), weight_groups=True, weight_scales=("f32", "f16"))
    made = quantkit.quantize(mixed(), "w4g12a8", randn(8, 2, 6, 6), target=target, **QUICK)
    assert {n: str(s) for n, s in made.plan.schemes.items() if n != "up"} == {
        "stem": "float", "hidden": "float", "head": "w4g12a8"
    }  # fmt: skip
    assert "groups of 12 (w4g12a8) do not divide the 18 inputs" in made.plan.why["stem"]


REFUSED = {
    "the target": (
        "w4g128a8",
        {},
        r"^weight groups \(w4g128\) are not supported .* Candidates that can run: w2a8, w3a8",
    ),
    "other schemes": ("w8a8", {"schemes": ["w4a8"]}, r"is not among schemes=\['w4a8'\]\. Leave schemes out"),
    "several by a rule": (
        "w8a8",
        {"rules": {"mix": ["w4a8", "w8a8"]}},
        r"offer layer 'mix' w4a8 or w8a8, and with w8a8",
    ),
    "latency": ("w8a8, latency=50%", {}, r"^latency beside the scheme w8a8: a scheme leaves nothing to choose"),
    "no weights": ("a8", {}, r"^The budget 'a8' has no weight format: ask for a scheme such as"),
    "float": ("float", {}, r"^The budget 'float' quantizes nothing"),
}


@pytest.mark.parametrize(("budget", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_had_is_refused(budget: str, options: dict[str, Any], message: str, monkeypatch) -> None:
    monkeypatch.setattr(whole, "apply_plan", lambda *_: pytest.fail("something was applied"))
    with pytest.raises(InvalidRequest, match=message):
        quantkit.quantize(small(), budget, images(), **QUICK, **options)


def test_activations_need_data_and_weights_do_not() -> None:
    with pytest.raises(InvalidRequest, match="w8a8 quantizes activations, and without data nothing is known"):
        quantkit.quantize(small(), "w8a8", progress=False)
    made = quantkit.quantize(small(), "w4", example_inputs=images(2), progress=False)
    assert {str(s) for s in made.plan.schemes.values()} == {"w4"}


def nearness(model: nn.Module) -> float:
    """Minus the distance of the outputs to those of the float model."""
    with torch.no_grad():
        return -float((model(images(8, seed=9)) - small()(images(8, seed=9))).abs().mean())


def test_an_accuracy_limit_on_the_only_candidate_is_measured_and_what_fails_it_is_handed_over(tmp_path) -> None:
    made = quantkit.quantize(small(), "w8a8, accuracy_drop=1", images(), evaluate=nearness, **QUICK)
    assert made.metrics["float"] - made.metrics["quantized"] <= 1
    assert made.metrics["evaluations"] == 1
    with pytest.raises(AccuracyNotMet) as caught:
        quantkit.quantize(small(), "accuracy_drop=1e-9", images(), schemes=["w2a8"], evaluate=nearness, **QUICK)
    best = caught.value.best
    assert {str(s) for s in best.plan.schemes.values()} == {"w2a8"}
    assert best.export_onnx(tmp_path / "best.onnx").file_bytes > 0
    assert best.metrics["quantized"] < best.metrics["float"]


def test_a_profile_allocates_a_scheme_and_keeps_what_rules_gave() -> None:
    blank = make_ready(small(), images(), schemes=["w4a8", "w8a8"], rules={"head": "w6a8"}).unmeasured()
    plan = quantkit.allocate(blank, "w4a8")
    assert {n: str(s) for n, s in plan.schemes.items()} == {
        "stem.0": "w4a8", "conv": "w4a8", "mix": "w4a8", "head": "w6a8"
    }  # fmt: skip
    with pytest.raises(InvalidRequest, match="w3a8 was not profiled; profiled: w4a8, w6a8, w8a8"):
        quantkit.allocate(blank, "w3a8")
    with pytest.raises(InvalidRequest, match="names the scheme of every layer: leave schemes out"):
        quantkit.allocate(blank, "w4a8", schemes=["w8a8"])


def test_what_was_said_is_kept_once(caplog: pytest.LogCaptureFixture) -> None:
    twice = [(images(4), torch.zeros(4)), (images(4, seed=2), torch.zeros(4))]
    made = quantkit.quantize(small().train(), "w8a8", twice, **QUICK)
    labels = "calibration items carry 1 more value(s) than the model takes (labels?): not used"
    said = [record.getMessage() for record in caplog.records if record.name == "quantkit"]
    assert made.notes["notices"] == said
    assert said.count(labels) == 1
    assert "the model is in training mode: quantizing a copy in eval mode" in said


class Recurrent(nn.Module):
    """An LSTM alone, whose inputs have no codes."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x):
        return self.memory(x)[0][:, -1]


class Mapped(nn.Module):
    """A linear layer under vmap, where nothing is seen to make its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        return torch.func.vmap(lambda row: self.head(self.inward(row).relu()))(x)


@pytest.mark.parametrize(("build", "shape"), [(Recurrent, (32, 5, 8)), (Mapped, (32, 8))])
def test_where_no_layer_can_read_codes_the_scheme_is_that_of_the_weights(build, shape: tuple[int, ...]) -> None:
    x = randn(*shape)
    plan = quantkit.quantize(build().eval(), "w8a8", x, progress=False).plan
    assert {str(scheme) for scheme in plan.schemes.values()} - {"float"} == {"w8"}
