"""Measured around a plan: damage is the increase over the plan's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantkit.sensitivity import ESTIMATORS, NO_INPUTS, RANKINGS
from quantkit.sensitivity.around import PlanDamage
from quantkit.sensitivity.damage import KLDamage
from quantkit.sensitivity.measure import Perturbation, Subject
from tests.sensitivity.explicit import Explicit
from tests.sensitivity.networks import by_hand, classifier, generator, inputs, perturbed, request_of, subject_of

ADDITIVE = sorted(set(ESTIMATORS) - RANKINGS - NO_INPUTS)


@pytest.fixture(scope="module")
def case() -> tuple[Subject, list[Perturbation], list[int], np.ndarray, Explicit]:
    """A subject around a plan of weights, all perturbations, the plan's positions, the measured increase of each
    change, and explicit derivatives at the plan.
    """
    batches = inputs(24)
    request = request_of(classifier(), batches)
    changes = perturbed(request)
    plan = [k for k, p in enumerate(changes) if (p.owner, p.format) in {("0", "w4"), ("2", "w2"), ("4", "w4")}]
    x = torch.cat([args[0] for args, _ in batches])
    reference = by_hand(request, x, [])

    def damage(chosen: list[Perturbation]) -> float:
        return float(KLDamage().rows(reference, by_hand(request, x, chosen)).double().mean())

    base = [changes[k] for k in plan]
    increase = np.array([damage([b for b in base if b.place != p.place] + [p]) - damage(base) for p in changes])
    subject = subject_of(request, batches)
    subject.base = base
    return subject, changes, plan, increase, Explicit(request, batches, base)


@pytest.mark.parametrize("name", ["kl", "gram", "pairwise"])
def test_measured_increase_is_that_of_a_slow_twin_and_may_be_a_gain(case, name: str) -> None:
    subject, changes, plan, increase, _ = case
    scores = ESTIMATORS[name](subject, changes, False, generator())
    assert np.allclose(scores.damage, increase, rtol=2e-3, atol=1e-6)
    assert scores.damage.min() < 0 and not scores.damage[plan].any()
    assert scores.notes["base_damage"] == pytest.approx(PlanDamage(_plain(subject), changes, False).plans([plan])[0])


def _plain(subject: Subject) -> Subject:
    return Subject(subject.model, subject.batches, subject.sites)


def test_gram_around_a_plan_has_the_pair_terms_that_improving_it_uses(case) -> None:
    subject, changes, plan, _, _ = case
    scores = ESTIMATORS["gram"](subject, changes, False, generator())
    damage, pairs = PlanDamage(_plain(subject), changes, False).around(plan)
    assert np.allclose(scores.damage, damage - damage[plan[0]], atol=1e-9)
    apart = ~np.eye(len(changes), dtype=bool)
    assert np.allclose(scores.gram[apart], pairs[apart], rtol=1e-4, atol=1e-7)


def test_second_order_around_a_plan_has_a_slope_too(case) -> None:
    subject, changes, _, _, exact = case
    moved = exact.displacements(changes)
    slope, curved = moved @ exact.gradient, moved @ exact.hessian @ moved.T
    scores = ESTIMATORS["hvp-pairs"](subject, changes, False, generator())
    assert np.allclose(scores.damage, slope + 0.5 * np.diag(curved), rtol=2e-3, atol=1e-5)
    apart = ~np.eye(len(changes), dtype=bool)
    assert np.allclose(scores.gram[apart], curved[apart], rtol=2e-3, atol=2e-5)
    first = ESTIMATORS["first-order"](subject, changes, False, generator())
    assert np.allclose(first.damage, slope, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ADDITIVE)
def test_every_estimator_takes_a_base_and_gives_it_back_unharmed(case, name: str) -> None:
    subject, changes, plan, _, _ = case
    before = {n: t.clone() for n, t in subject.model.state_dict().items()}
    scores = ESTIMATORS[name](subject, changes, False, generator())
    assert scores.damage.shape == (len(changes),) and np.isfinite(scores.damage).all()
    if name != "noise":  # which does not care where codes lie
        assert np.abs(scores.damage[plan]).max() < 1e-6
    assert all(torch.equal(t, before[n]) for n, t in subject.model.state_dict().items())


@pytest.mark.parametrize("name", ["hvp-pairs", "fisher", "hessian-trace"])
def test_sites_of_a_base_are_quantized_while_its_curvature_is_taken(case, name: str) -> None:
    """With the only 8-bit format in every site, changes of sites are none, and the slopes of weights change."""
    subject, changes, plan, _, _ = case
    sites = [k for k, p in enumerate(changes) if p.place[1]]
    coarse = [_coarser(changes[k]) for k in sites]
    quantized = Subject(subject.model, subject.batches, subject.sites, base=[*subject.base, *coarse])
    scores = ESTIMATORS[name](quantized, [*changes[:9], *coarse], False, generator())
    assert np.abs(scores.damage[[*plan, *range(9, 12)]]).max() < 1e-6
    without = ESTIMATORS[name](subject, changes[:9], False, generator())
    assert not np.allclose(scores.damage[:9], without.damage, rtol=0.02)


def _coarser(p: Perturbation) -> Perturbation:
    range_ = type(p.change)(p.change.scale * 17, round(p.change.zero_point / 17), 4)
    return Perturbation(p.owner, "a4", range_)
