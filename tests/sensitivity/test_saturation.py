"""Whole plans that are measured, and the two numbers fitted to them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from quantkit.plan import saturated
from quantkit.sensitivity.gram import gram
from quantkit.sensitivity.measure import KLDamage, Perturbation
from quantkit.sensitivity.saturation import MOST_PLANS, bits_of, fitted, plans_measured, random_plans
from tests.sensitivity.networks import by_hand, classifier, inputs, perturbed, request_of, subject_of


@pytest.fixture(scope="module")
def changes() -> list[Perturbation]:
    return perturbed(request_of(classifier(), inputs()))


def test_saturated_damage_keeps_order_and_small_values_and_has_an_end() -> None:
    q = np.geomspace(1e-6, 1e6, 60)
    bent = saturated(q, 1 / 0.3)
    assert (np.diff(bent) > 0).all()
    assert bent[0] == pytest.approx(1e-6, rel=1e-4)
    assert bent[-1] == pytest.approx(0.3, rel=1e-4)
    assert (saturated(q, 0) == q).all()


@pytest.mark.parametrize("end", [0.02, 0.3, 5.0])
@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_fit_finds_what_damages_were_made_with(end: float, strength: float) -> None:
    draw = np.random.default_rng(0)
    alone = draw.lognormal(-2, 2, size=40)
    quadratic = alone * draw.uniform(1, 4, size=40)
    measured = saturated(alone + strength * (quadratic - alone), 1 / end) * draw.lognormal(0, 0.03, size=40)
    found, limit = fitted(alone, quadratic, measured)
    assert found == pytest.approx(strength, abs=0.15)
    assert limit == pytest.approx(1 / end, rel=0.3)


def test_no_other_strength_and_end_come_nearer() -> None:
    draw = np.random.default_rng(0)
    alone = draw.lognormal(-2, 2, size=24)
    quadratic = alone * draw.uniform(1, 2, size=24)
    measured = saturated(alone + 0.5 * (quadratic - alone), 0.7) * draw.lognormal(0, 0.3, size=24)

    def miss(strength: float, limit: float) -> float:
        predicted = saturated(alone + strength * (quadratic - alone), limit)
        return float(np.abs(np.log(predicted / measured)).mean())

    nearest = miss(*fitted(alone, quadratic, measured))
    grid = [0.0, *(np.logspace(-3, 3, 97) / alone.max())]
    assert all(nearest <= miss(a, s) + 1e-9 for a in np.arange(21) / 20 for s in grid)


def test_nothing_is_bent_where_predictions_do_not_overshoot() -> None:
    q = np.geomspace(1e-4, 10, 24)
    assert fitted(q / 2, q, q) == (1, 0)
    assert fitted(q / 2, q, 1.5 * q) == (1, 0)
    assert fitted(np.zeros(3), np.zeros(3), np.ones(3)) == (1, 0)
    assert fitted(np.zeros(0), np.zeros(0), np.zeros(0)) == (1, 0)


def test_plans_have_one_format_per_place_and_begin_at_every_width(changes: list[Perturbation]) -> None:
    plans = random_plans(changes, 12, torch.Generator().manual_seed(0))
    for plan in plans:
        assert Counter(changes[k].place for k in plan) == Counter({p.place: 1 for p in changes})
    widths = [{bits_of(changes[k]) for k in plan if not changes[k].place[1]} for plan in plans]
    assert all(min(w) >= (2 if n % 2 == 0 else 4) for n, w in enumerate(widths))
    assert any(w == {2, 4} for w in widths) and any(8 in w and 2 in w for w in widths)
    assert plans == random_plans(changes, 12, torch.Generator().manual_seed(0))


def test_whole_plans_are_a_small_part_of_a_profile() -> None:
    assert [plans_measured(k) for k in (5, 6, 12, 143, 144, 10_000)] == [0, 1, 2, 23, MOST_PLANS, MOST_PLANS]


def test_profile_measures_whole_plans_and_predicts_them_better(changes: list[Perturbation]) -> None:
    """Layers in a row that shrink what they are given: the quadratic form adds up what only happens once."""
    batches = inputs(60)
    request = request_of(classifier(), batches)
    rough = [replace(p, change=replace(p.change, scale=p.change.scale * 0.2)) for p in changes if not p.place[1]]
    more = rough * 4  # formats enough for several plans
    more = [replace(p, format=f"{p.format}-{n}") for n, p in enumerate(more)]
    scores = gram(subject_of(request, batches), more, progress=False)
    plans = random_plans(more, plans_measured(len(more)), torch.Generator().manual_seed(0))
    assert scores.notes["whole_plans"] == len(plans) == 6
    x = torch.cat([args[0] for args, _ in batches])
    reference = by_hand(request, x, [])
    outputs = [by_hand(request, x, [more[k] for k in plan]) for plan in plans]
    truth = np.array([float(KLDamage().rows(reference, o).mean()) for o in outputs])
    assert scores.saturation > 0
    predicted = np.array([scores.predict(plan) for plan in plans])
    alone = np.array([scores.damage[plan].sum() for plan in plans])
    unbent = np.array([replace(scores, saturation=0.0).predict(plan) for plan in plans])
    assert np.abs(np.log(predicted / truth)).mean() < 0.8 * np.abs(np.log(alone / truth)).mean()
    strongest = alone + (unbent - alone) / scores.notes["pair_strength"]
    assert fitted(alone, strongest, truth) == pytest.approx((scores.notes["pair_strength"], scores.saturation))
    assert scores.notes["whole_plan_error"] == pytest.approx(float(np.median(np.abs(predicted / truth - 1))), rel=1e-4)
