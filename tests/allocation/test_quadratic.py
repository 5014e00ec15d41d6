"""Pair terms: the proven optimum is brute force's, bounds lie below it, the gap is what was left open, swaps do not
make worse.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given

from quantkit.allocation import enumeration, quadratic
from quantkit.allocation.feasibility import OutOfReach
from quantkit.allocation.presolve import presolve
from quantkit.allocation.problem import Problem
from quantkit.allocation.problem_arrays import ProblemArrays
from quantkit.allocation.registry import Settings
from quantkit.allocation.relaxation import relax
from quantkit.allocation.solve import solve
from tests.allocation.helpers import everything, optimum, random_problem
from tests.allocation.strategies import networks, repeatable

PRECISION = 1e-9
SMALL = {"choices": (1, 6), "options": (1, 4), "limits": (1, 4), "pairs": True}


def scale_of(problem: Problem) -> float:
    assert problem.pairs is not None
    return PRECISION * float(np.abs(problem.pairs).max())


@repeatable(100)
@given(networks(**SMALL))
def test_quadratic_finds_and_proves_what_brute_force_finds(problem: Problem) -> None:
    best = optimum(problem)
    if best is None:
        with pytest.raises(OutOfReach):
            solve(problem)
        return
    found = solve(problem)
    assert problem.feasible(found.assignment)
    assert found.objective == pytest.approx(best, abs=scale_of(problem))
    assert found.proven
    assert found.gap <= PRECISION


@pytest.mark.slow
@repeatable(40)
@given(networks(**SMALL))
def test_tree_search_alone_finds_the_optimum(problem: Problem) -> None:
    """What larger problems rely on, made to work where brute force can follow: nothing is enumerated at the root, and
    little at the leaves.
    """
    best = optimum(problem)
    if best is None:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quadratic, "can_enumerate", lambda arrays, most=0: enumeration.can_enumerate(arrays, 8))
        found = solve(problem)
    assert found.objective == pytest.approx(best, abs=scale_of(problem))
    assert found.bound <= best + scale_of(problem)


@repeatable(100)
@given(networks(**SMALL))
def test_relaxation_bounds_every_assignment_and_every_option(problem: Problem) -> None:
    """``forced`` of an option bounds all feasible assignments that take it."""
    reduced = presolve(problem).problem
    relaxation = relax(reduced, ProblemArrays.of(reduced))
    found = everything(reduced)
    inside = found.within([limit for _, limit in reduced.limits])
    options, objectives = found.options[inside], found.objectives[inside]
    assert (relaxation.bound <= objectives + scale_of(problem)).all()
    for i, start in enumerate(reduced.offsets[:-1]):
        assert (relaxation.forced[start + options[:, i]] <= objectives + scale_of(problem)).all()


@repeatable(60)
@given(networks(choices=(1, 6), options=(1, 4), limits=(1, 4)))
def test_relaxation_bounds_separable_problems_too(problem: Problem) -> None:
    reduced = presolve(problem).problem
    relaxation, best = relax(reduced, ProblemArrays.of(reduced)), optimum(reduced)
    assert best is None or relaxation.bound <= best * (1 + PRECISION)


def test_relaxation_is_close_where_shifts_hardly_cancel() -> None:
    """A bound of zero would be valid too."""
    shares = []
    for seed in range(20):
        draw = np.random.default_rng(seed)
        problem = random_problem(draw, (6, 6), (4, 4), (1, 1), groups=False, pairs=True, dimensions=64)
        best = optimum(problem)
        if best is not None:
            reduced = presolve(problem).problem
            shares.append(relax(reduced, ProblemArrays.of(reduced)).bound / best)
    assert len(shares) > 15
    assert np.median(shares) > 0.5
    assert max(shares) <= 1 + PRECISION


@pytest.mark.slow
@repeatable(40)
@given(networks(**SMALL))
def test_swaps_never_end_worse_than_where_they_start(problem: Problem) -> None:
    best = optimum(problem)
    if best is None:
        return
    start = solve(problem, "highs")
    found = solve(problem, "swaps")
    assert problem.feasible(found.assignment)
    assert best - scale_of(problem) <= found.objective <= start.objective + scale_of(problem)
    assert found.bound <= best + scale_of(problem)


def test_gap_is_reported_as_it_is() -> None:
    """A tree search cut off at once keeps its answer, and its bound and gap say what was left open."""
    problem = random_problem(np.random.default_rng(5), (9, 9), (4, 4), (2, 2), groups=False, pairs=True, dimensions=3)
    best = optimum(problem)
    assert best is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quadratic, "can_enumerate", lambda arrays, most=0: False)
        found = solve(problem, settings=Settings(nodes=1))
    assert not found.proven
    assert found.bound <= best <= found.objective
    assert found.gap == pytest.approx((found.objective - found.bound) / found.objective)
    assert found.gap > 0


def test_solvers_of_sums_report_the_gap_of_the_whole_objective() -> None:
    """A solver that looks at damages alone is measured by the objective with pair terms."""
    problem = random_problem(np.random.default_rng(11), (6, 6), (4, 4), (1, 1), groups=False, pairs=True)
    best, alone = optimum(problem), optimum(replace(problem, pairs=None))
    assert best is not None and alone is not None
    found = solve(problem, "highs")
    assert problem.separable_objective(found.assignment) == pytest.approx(alone)
    assert found.objective == pytest.approx(problem.objective(found.assignment))
    assert found.objective > best * 1.001
    assert found.bound <= best
    assert found.gap >= (found.objective - best) / found.objective
    assert not found.proven
