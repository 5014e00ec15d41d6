"""Whole plans that are measured, and what is fitted to them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from quantkit.plan import saturated
from quantkit.sensitivity.damage import KLDamage
from quantkit.sensitivity.gram import gram
from quantkit.sensitivity.measure import Perturbation
from quantkit.sensitivity.saturation import (
    FADINGS,
    LEAST_PLANS,
    MOST_PLANS,
    Fit,
    fitted,
    plans_measured,
    random_plans,
)
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
    grown = saturated(q, 1 / 30, 2.0)
    assert (np.diff(grown) > 0).all()
    assert grown[0] == pytest.approx(1e-6, rel=1e-4)
    assert grown[-1] == pytest.approx(30, rel=1e-4)
    assert grown[30] > bent[30]


@pytest.mark.parametrize("count", [0, 1, LEAST_PLANS - 1])
def test_too_few_plans_say_nothing(count: int) -> None:
    """One whole plan is met by any bend that goes through it, however far off that is for all others."""
    plans, measured = [[0, 2], [0, 3], [1, 2]][:count], np.full(count, 1e-6)
    assert fitted(np.array([7e-4, 1e-7, 4e-4, 1e-7]), np.diag([14e-4, 2e-7, 8e-4, 2e-7]), plans, measured) == Fit()


def two_each(alone: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    """(damage, gram, plans) of plans of two changes each, none in two plans, with these sums of single damages and
    these pair terms.
    """
    gram = np.diag(np.repeat(alone, 2))
    first = np.arange(0, 2 * len(alone), 2)
    gram[first, first + 1] = gram[first + 1, first] = pairs
    return np.repeat(alone / 2, 2), gram, [[k, k + 1] for k in first.tolist()]


def one_fit(strength: float, fading: float = 0.0, limit: float = 0.0) -> Fit:
    return Fit((strength,), (fading,), limit)


@pytest.mark.parametrize("end", [0.02, 0.3, 5.0])
@pytest.mark.parametrize("strength", [0.25, 1.0])
@pytest.mark.parametrize("fading", [0.0, FADINGS[9]])
def test_fit_predicts_what_damages_were_made_with(end: float, strength: float, fading: float) -> None:
    draw = np.random.default_rng(0)
    alone = draw.lognormal(-2, 2, size=60)
    damage, gram, plans = two_each(alone, alone * draw.uniform(0, 3, size=60))
    made = one_fit(strength, fading / damage.max(), 1 / end)
    q = alone + _pair_sums(made, damage, gram, plans)
    measured = saturated(q, made.limit) * draw.lognormal(0, 0.02, size=60)
    found = fitted(damage, gram, plans, measured)
    again = saturated(alone + _pair_sums(found, damage, gram, plans), found.limit)
    assert np.median(np.abs(again / measured - 1)) < 0.08  # limits are tried in steps of 15 %
    assert found.limit == pytest.approx(1 / end, rel=0.4)
    if not fading:
        assert sum(found.strengths) == pytest.approx(strength, abs=0.2)


def _pair_sums(fit: Fit, damage: np.ndarray, gram: np.ndarray, plans: list[list[int]]) -> np.ndarray:
    """What pair terms add to each plan, pair by pair."""
    return np.array(
        [
            sum(
                strength * gram[k, m] / np.sqrt((1 + fading * damage[k]) * (1 + fading * damage[m]))
                for strength, fading in zip(fit.strengths, fit.fadings, strict=True)
                for n, k in enumerate(plan)
                for m in plan[n + 1 :]
            )
            for plan in plans
        ]
    )


def test_fit_is_the_average_of_all_fits_by_their_likelihood_and_its_limit_the_nearest() -> None:
    draw = np.random.default_rng(0)
    alone = draw.lognormal(-2, 2, size=12)
    damage, gram, plans = two_each(alone, alone * draw.uniform(0, 1, size=12))
    measured = saturated(alone + _pair_sums(one_fit(0.5), damage, gram, plans), 0.7) * draw.lognormal(0, 0.3, size=12)
    limits = np.array([0.0, *np.logspace(-3, 3, 97)]) / alone.max()
    growths = np.array([0.0, *np.logspace(-2, 3, 16)]) / alone.max()

    def misses(q: np.ndarray, growth: float) -> np.ndarray:
        grown = q * (1 + growth * q)
        predicted = np.stack([grown / (1 + s * grown) for s in limits])
        return np.abs(np.log(predicted / measured)).mean(1).clip(min=0.01)

    totals, shares = [0.0, 0.0], dict.fromkeys(FADINGS, 0.0)
    for fading in FADINGS:
        sums = _pair_sums(one_fit(1.0, fading / damage.max()), damage, gram, plans)
        for strength in np.arange(21) / 20:
            for growth in growths:
                likely = (misses(alone + strength * sums, growth) ** -12.0).sum() / (16 if growth else 1)
                totals[int(growth > 0)] += likely
                shares[fading] += strength * likely
    found = fitted(damage, gram, plans, measured)
    assert found.strengths == pytest.approx([share / sum(totals) for share in shares.values()], rel=1e-6)
    assert 0 < sum(found.strengths) < 1
    assert (found.growth > 0) <= (totals[1] > totals[0])
    q = alone + _pair_sums(found, damage, gram, plans)
    allowed = growths if totals[1] > totals[0] else [0.0]
    least = min(float(misses(q, growth).min()) for growth in allowed)
    bent = saturated(q, found.limit, found.growth)
    assert float(np.abs(np.log(bent / measured)).mean()) == pytest.approx(least, rel=1e-6)


def test_growth_is_found_where_damage_grows_faster_than_it_should_and_only_there() -> None:
    draw = np.random.default_rng(0)
    alone = draw.lognormal(-1, 1.5, size=40)
    damage, gram, plans = two_each(alone, alone * draw.uniform(0, 0.5, size=40))
    q = alone + _pair_sums(one_fit(1.0), damage, gram, plans)
    noise = draw.lognormal(0, 0.1, size=40)
    assert fitted(damage, gram, plans, q * noise).growth == 0
    found = fitted(damage, gram, plans, saturated(q, 0.02, 3.0) * noise)
    assert found.growth == pytest.approx(3.0, rel=1)
    again = saturated(alone + _pair_sums(found, damage, gram, plans), found.limit, found.growth)
    assert np.median(np.abs(again / saturated(q, 0.02, 3.0) - 1)) < 0.1


def test_few_plans_leave_pair_terms_between_none_and_all_and_many_settle_them() -> None:
    draw = np.random.default_rng(0)
    alone = draw.lognormal(-2, 1, size=400)
    damage, gram, plans = two_each(alone, alone * draw.uniform(0, 1, size=400))
    measured = (alone + _pair_sums(one_fit(1.0), damage, gram, plans)) * draw.lognormal(0, 0.2, size=400)
    few, many = (sum(fitted(damage, gram, plans[:n], measured[:n]).strengths) for n in (4, 400))
    assert 0.2 < few < 0.9 < many


def test_weakened_pair_terms_stay_positive_semi_definite_and_keep_the_diagonal() -> None:
    vectors = np.random.default_rng(0).normal(size=(12, 5)) * np.geomspace(0.1, 3, 12)[:, None]
    gram = vectors @ vectors.T
    damage = np.diag(gram) / 2
    for fit in (Fit(), one_fit(0.5), one_fit(1.0, 10.0), Fit((0.3, 0.4), (0.0, 0.3), 2.0)):
        weak = fit.weakened(damage, gram)
        assert np.linalg.eigvalsh(weak).min() > -1e-9
        assert np.diag(weak) == pytest.approx(np.diag(gram))
    assert Fit().weakened(damage, gram) == pytest.approx(gram)


def test_hardly_anything_is_bent_where_predictions_are_right() -> None:
    q = np.geomspace(1e-4, 10, 24)
    damage, gram, plans = two_each(q / 2, q / 2)
    found = fitted(damage, gram, plans, q)
    assert sum(found.strengths) > 0.9
    predicted = saturated(q / 2 + _pair_sums(found, damage, gram, plans), found.limit, found.growth)
    assert np.median(np.abs(predicted / q - 1)) < 0.02


def test_all_pair_terms_stay_where_there_is_nothing_to_fit_to() -> None:
    assert fitted(*two_each(np.zeros(3), np.zeros(3)), np.ones(3)) == Fit()
    assert fitted(np.zeros(0), np.zeros((0, 0)), [], np.zeros(0)) == Fit()


def test_plans_have_one_format_per_place_and_begin_at_every_width(changes: list[Perturbation]) -> None:
    plans = random_plans(changes, 12, torch.Generator().manual_seed(0))
    for plan in plans:
        assert Counter(changes[k].place for k in plan) == Counter({p.place: 1 for p in changes})
    widths = [{changes[k].change.bits for k in plan if not changes[k].place[1]} for plan in plans]
    assert all(min(w) >= (2 if n % 2 == 0 else 4) for n, w in enumerate(widths))
    assert any(w == {2, 4} for w in widths) and any(8 in w and 2 in w for w in widths)
    assert plans == random_plans(changes, 12, torch.Generator().manual_seed(0))


def test_whole_plans_are_a_small_part_of_a_profile() -> None:
    assert [plans_measured(k) for k in (3, 4, 12, 159, 160, 10_000)] == [0, 1, 3, 39, MOST_PLANS, MOST_PLANS]


def test_profile_measures_whole_plans_and_predicts_them_better(changes: list[Perturbation]) -> None:
    """Layers in a row that shrink what they are given: the quadratic form adds up what only happens once."""
    batches = inputs(60)
    request = request_of(classifier(), batches)
    rough = [replace(p, change=replace(p.change, scale=p.change.scale * 0.2)) for p in changes if not p.place[1]]
    more = rough * 4  # formats enough for several plans
    more = [replace(p, format=f"{p.format}-{n}") for n, p in enumerate(more)]
    scores = gram(subject_of(request, batches), more, progress=False)
    plans = random_plans(more, plans_measured(len(more)), torch.Generator().manual_seed(0))
    assert scores.notes["whole_plans"] == len(plans) == len(more) // 4
    x = torch.cat([args[0] for args, _ in batches])
    reference = by_hand(request, x, [])
    outputs = [by_hand(request, x, [more[k] for k in plan]) for plan in plans]
    truth = np.array([float(KLDamage().rows(reference, o).mean()) for o in outputs])
    assert scores.saturation > 0
    predicted = np.array([scores.predict(plan) for plan in plans])
    alone = np.array([scores.damage[plan].sum() for plan in plans])
    assert np.abs(np.log(predicted / truth)).mean() < 0.8 * np.abs(np.log(alone / truth)).mean()
    assert 0 <= scores.notes["pair_strength"] <= 1
    assert scores.notes["whole_plan_error"] == pytest.approx(float(np.median(np.abs(predicted / truth - 1))), rel=1e-4)
