"""A plan is measured beside the best plans of one scheme on samples held back, and no worse one is returned."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import quantkit
from quantkit.allocation.allocate import allocate
from quantkit.budget import Budget
from quantkit.plan import Plan, Profile
from quantkit.program.inputs import batch_size
from quantkit.progress import one_call, said
from quantkit.stages import against_uniform as module
from quantkit.stages.against_uniform import held_back, no_worse_than_uniform
from quantkit.stages.apply import Application
from quantkit.stages.options import ApplyOptions, Run
from quantkit.stages.profile import measure
from quantkit.stages.request import Request, make_ready
from tests.stages.networks import images, small

QUIET = Run(progress=False)
BUDGET = Budget.parse("6 bits")
APPLICATION = Application(ApplyOptions(rounding="nearest"), run=QUIET)


@pytest.fixture(scope="module")
def measured() -> tuple[Request, Profile]:
    request = make_ready(small(), images(32), schemes=["w2", "w4", "w8"], rounding="nearest")
    return request, measure(request, QUIET)


def choose(profile: Profile) -> Plan:
    return allocate(profile, BUDGET)


def backwards(profile: Profile) -> Plan:
    """The plan of a profile in which the narrowest formats do the least damage, which it predicts to be large."""
    wrong = replace(profile, damage=1 / profile.damage, gram=profile.gram * 0)
    plan = allocate(wrong, BUDGET)
    assert {str(s) for s in plan.schemes.values()} == {"w2"}
    return replace(plan, predicted_damage=1e9)


def test_a_plan_that_does_more_damage_than_one_scheme_for_all_is_not_returned(measured) -> None:
    request, profile = measured
    with one_call():
        found = no_worse_than_uniform(request.session, profile, backwards(profile), choose, APPLICATION)
        assert any("the former is returned" in text for text in said())
    assert set(map(str, found.schemes.values())) == {"w4"} and found.average_bits <= 6
    record = found.provenance["against_uniform"]
    assert record["returned"] == "w4" and record["damage"] > record["uniform"]["w4"] and record["samples"] == 4 * 32


def test_a_plan_that_does_less_is_and_the_model_stays_as_it_was(measured) -> None:
    request, profile = measured
    batches = request.session.inputs.batches
    with torch.no_grad():
        before = request.session.prepared.model(images(4))
    plan = replace(choose(profile), predicted_damage=1e9)
    found = no_worse_than_uniform(request.session, profile, plan, choose, APPLICATION)
    if plan.schemes != dict.fromkeys(plan.schemes, plan.schemes["conv"]):
        record = found.provenance["against_uniform"]
        assert "returned" not in record and record["damage"] < min(record["uniform"].values())
    assert request.session.inputs.batches is batches
    with torch.no_grad():
        assert torch.equal(request.session.prepared.model(images(4)), before)


def test_what_is_clearly_better_by_prediction_is_not_measured(measured, monkeypatch: pytest.MonkeyPatch) -> None:
    request, profile = measured
    monkeypatch.setattr(module, "_Trials", None)
    plan = replace(choose(profile), predicted_damage=0.0)
    assert no_worse_than_uniform(request.session, profile, plan, choose, APPLICATION) is plan


def test_every_fourth_sample_is_held_back_and_no_other() -> None:
    batches = [((part,), {}) for part in torch.arange(38.0).reshape(-1, 1).split(5)]
    kept, held = held_back(batches)
    every = torch.cat([args[0] for args, _ in (*kept, *held)]).flatten().sort().values
    assert torch.equal(every, torch.arange(38.0))
    assert [float(x) for args, _ in held for x in args[0]] == [float(n) for n in range(3, 38, 4)]
    few = batches[:3]
    assert held_back(few) == (few, few) and sum(map(batch_size, few)) == 15


@pytest.mark.parametrize("budget", ["4.1 bits", "5 bits"])
def test_quantize_says_what_it_was_measured_beside(budget: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLEARLY_BETTER", 0.0)
    made = quantkit.quantize(
        small(), budget, images(32), schemes=["w2a8", "w3a8", "w8a8"], reconstruction="none", correction=None,
        progress=False,
    )  # fmt: skip
    record = made.plan.provenance["against_uniform"]
    assert list(record["uniform"]) == ["w3a8", "w2a8"] or set(record["uniform"]) <= {"w2a8", "w3a8"}
    best = min(record["uniform"], key=record["uniform"].__getitem__)
    assert ("returned" in record) == (record["uniform"][best] - record["damage"] < record["error"])
    assert record["samples"] == 4 * 8  # every fourth, in four mixes
