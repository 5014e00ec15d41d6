"""A limit on the accuracy drop: the plan that comes back was evaluated, meets it, and no cheaper applied one
does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

import quantkit
from quantkit.errors import AccuracyNotMet, InfeasibleBudget, InvalidRequest
from quantkit.reconstruction.learning import LearningOptions, Schedule
from quantkit.simulation.model import as_float
from quantkit.stages import accuracy
from tests.stages.networks import small
from tests.stages.schedules import shorten

SCHEMES = ["w2a8", "w3a8", "w4a8", "w8a8"]
SHORT = LearningOptions(
    network=Schedule(steps=60, batch=32, code_rate=3e-4, checks=4),
    block=Schedule(steps=30, batch=32, code_rate=3e-3, checks=2),
    tuning=Schedule(steps=20, batch=32, bias_rate=3e-3, checks=2),
)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every plan that is tried learns."""
    shorten(SHORT, monkeypatch)


def images(count: int, seed: int) -> Tensor:
    return torch.randn(count, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


@cache
def fidelity() -> Callable[[nn.Module], float]:
    """100 less the relative error, in percent, of a model's outputs on 400 unseen images."""
    x = images(400, 9)
    with torch.no_grad():
        expected = small()(x)

    def evaluate(model: nn.Module) -> float:
        with torch.no_grad():
            return 100 - float((model(x) - expected).norm() / expected.norm() * 100)

    return evaluate


def quantize(budget: object, evaluate: Callable[[nn.Module], float] | None = None, **options: object):
    return quantkit.quantize(
        small(), budget, [images(64, 1)], evaluate=evaluate, schemes=SCHEMES, progress=False, **options
    )


DROPS = (0.5, 2.0, 5.0)


@cache
def within(drop: float):
    return quantize({"accuracy_drop": drop}, fidelity())


@pytest.mark.parametrize("drop", DROPS)
def test_result_meets_the_limit_and_no_cheaper_plan_of_the_curve_does(drop: float) -> None:
    evaluate, result = fidelity(), within(drop)
    assert 100 - evaluate(result.model) <= drop
    assert result.metrics["quantized"] == evaluate(result.model)
    cheaper = [lost for cost, lost in result.curve if cost < result.plan.total_bytes]
    assert all(lost > drop for lost in cheaper)
    assert 1 <= len(result.curve) <= result.metrics["evaluations"]


def test_the_curve_has_what_was_applied_not_what_was_expected_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """All plans look as good as the float model before they are applied, and most are too near to be tried."""
    monkeypatch.setattr(
        accuracy, "_cursory", lambda search, evaluate, plan: evaluate(as_float(search.request.ready.model))
    )
    monkeypatch.setattr(accuracy, "APART", 0.4)
    result = quantize("accuracy_drop=2", fidelity())
    cheaper = [lost for cost, lost in result.curve if cost < result.plan.total_bytes]
    assert cheaper and all(lost > 2 for lost in cheaper)
    assert len(result.curve) < result.metrics["evaluations"]


def test_more_drop_allowed_gives_a_smaller_plan() -> None:
    sizes = [within(drop).plan.total_bytes for drop in DROPS]
    assert sizes[0] > sizes[1] > sizes[2]
    assert quantize("accuracy_drop=5%", fidelity()).plan.total_bytes == sizes[2], "5 % of 100 points"


def test_other_limits_hold_too() -> None:
    evaluate = fidelity()
    result = quantize("5 bits, accuracy_drop=8", evaluate)
    assert result.plan.average_bits <= 5
    assert 100 - evaluate(result.model) <= 8
    with pytest.raises(InfeasibleBudget):
        quantize("1 bits, accuracy_drop=50", evaluate)


def test_limit_that_cannot_be_met_comes_with_the_best_plan_and_the_curve() -> None:
    evaluate = fidelity()
    with pytest.raises(
        AccuracyNotMet, match=r"No plan keeps the drop within 0\.001.*Measured drop at size: "
    ) as failed:
        quantize("3 bits, accuracy_drop=0.001", evaluate)
    assert failed.value.exit_code == 3
    assert failed.value.best.plan.average_bits <= 3
    lost = failed.value.best.metrics["float"] - failed.value.best.metrics["quantized"]
    assert lost == pytest.approx(min(drop for _, drop in failed.value.curve))
    assert failed.value.curve
    assert all(lost > 0.001 for _, lost in failed.value.curve)


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["w8a8, accuracy_drop=1e-6", "accuracy_drop=1e-6"])
def test_wide_formats_are_learned_before_they_are_given_up(budget: str) -> None:
    """Which 8-bit plans are otherwise not; what is handed over is the better of both."""
    x = [images(64, 1)]
    with pytest.raises(AccuracyNotMet) as failed:
        quantkit.quantize(small(), budget, x, schemes=["w8a8", "w7a8"], evaluate=fidelity(), progress=False)
    plain = quantkit.quantize(small(), "w8a8", x, evaluate=fidelity(), progress=False)
    best = failed.value.best
    assert best.metrics["quantized"] >= plain.metrics["quantized"]
    assert any("learning at these formats" in said for said in plain.notes["notices"]) is False
    assert "reconstruction" in best.notes or best.metrics["quantized"] == plain.metrics["quantized"]


def per_sample() -> Callable[[nn.Module], Tensor]:
    """For each of 400 unseen images 100 where the largest output is the float network's."""
    x = images(400, 9)
    with torch.no_grad():
        expected = small()(x).argmax(-1)

    def evaluate(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return 100.0 * (model(x).argmax(-1) == expected)

    return evaluate


def test_confidence_bound_of_the_drop_can_be_the_criterion() -> None:
    evaluate = per_sample()
    plain, confident = (quantize(f"accuracy_drop=6{more}", evaluate) for more in ("", ", confident=true"))
    for result in (plain, confident):
        outcome = evaluate(result.model)
        assert result.metrics["quantized"] == pytest.approx(float(outcome.mean()))
        drop = 100 - outcome.double()
        bound = float(drop.mean() + 1.6448536 * drop.std() / len(drop) ** 0.5)
        assert result.metrics["drop_bound"] == pytest.approx(bound, rel=1e-5)
    assert confident.metrics["drop_bound"] <= 6
    assert confident.plan.total_bytes >= plain.plan.total_bytes
    with pytest.raises(InvalidRequest, match="one number per sample"):
        quantize("accuracy_drop=6, confident=true", fidelity())


def likeness() -> Callable[[nn.Module], float]:
    """100 less the KL divergence from the float network's answers in thousandths, on 400 unseen images: what learning
    lowers.
    """
    x = images(400, 9)
    with torch.no_grad():
        expected = small()(x).log_softmax(-1)

    def evaluate(model: nn.Module) -> float:
        with torch.no_grad():
            found = model(x).log_softmax(-1)
        return 100 - 1000 * float(kl_div(found, expected, log_target=True, reduction="batchmean"))

    return evaluate


def test_what_learning_gains_is_spent_on_size(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = likeness()
    learned = quantize("accuracy_drop=0.01", evaluate)
    monkeypatch.setattr("quantkit.stages.accuracy.APPLIED_TRIES", {"fast": 0})
    assert learned.plan.total_bytes < quantize("accuracy_drop=0.01", evaluate).plan.total_bytes


def test_limit_that_only_learning_meets_is_met() -> None:
    evaluate = likeness()
    with pytest.raises(AccuracyNotMet) as failed:
        quantize("3 bits, accuracy_drop=0.001", evaluate, reconstruction="none", correction="none")
    rounded = min(lost for _, lost in failed.value.curve)
    learned = quantize("3 bits, accuracy_drop=100", evaluate)
    asked = 0.95 * rounded
    assert 100 - evaluate(quantize(f"3 bits, accuracy_drop={asked}", evaluate).model) <= asked
    assert all(found != rounded for _, found in learned.curve)


def test_more_effort_evaluates_more_plans_and_never_ends_with_a_dearer_one() -> None:
    evaluate, fast = fidelity(), within(2.0)
    balanced = quantize("accuracy_drop=2", evaluate, effort="balanced")
    assert balanced.metrics["evaluations"] > fast.metrics["evaluations"]
    assert balanced.plan.total_bytes <= fast.plan.total_bytes
    assert 100 - evaluate(balanced.model) <= 2


class TwoReaders(nn.Module):
    """Two layers read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.other, self.head = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head((self.one(x) + self.other(x)).relu())


def test_more_effort_copes_with_readers_of_one_tensor_that_are_offered_different_formats() -> None:
    torch.manual_seed(0)
    model, x = TwoReaders().eval(), torch.randn(40, 8)
    answers = model(x).argmax(1)
    result = quantkit.quantize(
        model, "accuracy_drop=0.9", [x], schemes=["w8a8", "w4a4"], rules={"other": ["w4a4"]}, effort="balanced",
        evaluate=lambda m: float((m(x).argmax(1) == answers).float().mean()), progress=False,
    )  # fmt: skip
    assert str(result.plan.schemes["one"].activation) == str(result.plan.schemes["other"].activation) == "a4"


@pytest.mark.parametrize(
    ("budget", "evaluate", "message"),
    [
        ("accuracy_drop=1", None, "needs evaluate, a function model -> number"),
        ("4 bits, minimize=size", fidelity(), "add accuracy_drop"),
    ],
)
def test_request_without_what_it_needs_is_refused_first(budget: str, evaluate, message: str, monkeypatch) -> None:
    monkeypatch.setattr("quantkit.api.make_ready", lambda *a, **k: pytest.fail("looked at the model"))
    with pytest.raises(InvalidRequest, match=message):
        quantize(budget, evaluate)
