"""The Lagrangian sweep: every point can be had, lies on the convex hull of all there is, and no vertex is missing."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given

from quantkit.allocation.allocate import allocate
from quantkit.allocation.pareto import pareto
from quantkit.allocation.pareto_front import pareto_front
from quantkit.allocation.problem import Problem
from quantkit.errors import InvalidRequest
from tests.allocation.helpers import everything, front, hull_value
from tests.allocation.profiles import network
from tests.allocation.strategies import awkward_problems, networks, repeatable

PRECISION = 1e-9


def assert_hull(problem: Problem) -> None:
    listed = everything(problem)
    if not len(listed.options):
        with pytest.raises(InvalidRequest):
            pareto_front(problem)
        return
    best = front(listed.costs[:, 0], listed.sums)
    rounding = PRECISION * float(np.abs(listed.sums).max())
    found = pareto_front(problem)
    for point in found:
        assert problem.consistent(point.assignment)
        assert point.cost == problem.cost(point.assignment)[0]
        assert point.objective == pytest.approx(problem.objective(point.assignment), abs=rounding)
        assert point.objective == pytest.approx(hull_value(best, point.cost), abs=rounding)
    assert [p.cost for p in found] == sorted({p.cost for p in found})
    for k, (cost, value) in enumerate(best):
        rest = best[:k] + best[k + 1 :]
        inner = 0 < k < len(best) - 1
        if not inner or value < hull_value(rest, cost) - rounding:
            assert any(p.cost == cost and abs(p.objective - value) <= rounding for p in found), "a vertex is missing"


@repeatable(80)
@given(networks(limits=(1, 1)))
def test_front_of_a_network_is_the_hull_of_all_plans(problem: Problem) -> None:
    assert_hull(problem)


@repeatable(80)
@given(awkward_problems(limits=(1, 1)))
def test_front_of_an_awkward_problem_is_the_hull_of_all_plans(problem: Problem) -> None:
    assert_hull(problem)


@repeatable(60)
@given(networks(limits=(1, 1), pairs=True))
def test_front_with_pair_terms_holds_plans_that_no_other_of_it_beats(problem: Problem) -> None:
    """Swaps only improve the vertices: at no more cost, the objective is at most theirs."""
    found = pareto_front(problem)
    for point in found:
        assert problem.consistent(point.assignment)
        assert point.cost == problem.cost(point.assignment)[0]
        assert point.objective == pytest.approx(problem.objective(point.assignment))
    assert all(a.objective > b.objective for a, b in pairwise(found))
    for vertex in pareto_front(replace(problem, pairs=None)):
        within = [point.objective for point in found if point.cost <= vertex.cost]
        assert min(within) <= problem.objective(vertex.assignment) * (1 + PRECISION)


def test_front_needs_one_limit() -> None:
    problem = Problem((), (("size", 1), ("bops", 1)))
    with pytest.raises(InvalidRequest, match="A front needs one limit to go along; the problem has 2"):
        pareto_front(problem)


@pytest.mark.parametrize("pairs", [False, True], ids=["sum", "pairs"])
@pytest.mark.parametrize("limit", ["size", "average_bits", "bops"])
def test_plans_of_a_front_rise_in_cost_and_fall_in_damage(limit: str, pairs: bool) -> None:
    profile = network(1, layers=8, pairs=pairs)
    plans = pareto(profile, limit=limit)
    costs = {
        "size": [plan.total_bytes for plan in plans],
        "average_bits": [plan.average_bits for plan in plans],
        "bops": [sum(_bops(profile.layers[n].macs, s) for n, s in plan.schemes.items()) for plan in plans],
    }[limit]
    damages = [plan.predicted_damage for plan in plans]
    assert len(plans) > 5
    assert costs == sorted(set(costs))
    assert damages == sorted(set(damages), reverse=True)
    assert all(plan.provenance["front"] == limit for plan in plans)
    if limit == "average_bits" and not pairs:
        middle = plans[len(plans) // 2]
        assert allocate(profile, f"{middle.average_bits + 1e-6} bits").schemes == middle.schemes


def _bops(macs: int, scheme: object) -> int:
    weight, activation = scheme.weight, scheme.activation  # type: ignore[attr-defined]
    return (weight.bits if weight else 32) * (activation.bits if activation else 32) * macs
