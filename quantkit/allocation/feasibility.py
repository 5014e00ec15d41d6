"""Which limit cannot be met, and the least that can be reached."""

from __future__ import annotations

from dataclasses import replace

from quantkit.allocation.arrays import Arrays
from quantkit.allocation.highs import minimize
from quantkit.allocation.problem import Choice, Problem
from quantkit.allocation.registry import NoAssignment, Settings
from quantkit.errors import InfeasibleBudget


def require_each_limit(problem: Problem) -> None:
    """Raise InfeasibleBudget when a limit of a reduced problem is below the least its cost can be."""
    arrays = Arrays.of(problem)
    for k, (name, limit) in enumerate(problem.limits):
        if (least := arrays.smallest(k)) > limit:
            raise InfeasibleBudget(
                f"The limit {name} = {limit:,} cannot be met: the smallest is {least:,}.", name, least
            )


def explain_infeasible(problem: Problem) -> InfeasibleBudget:
    """The error for a reduced problem whose limits can each be met, but not together: a limit, and the least its cost
    can be while the others hold. Where no single limit is to blame, the first that cannot be added to those before
    it."""
    count = len(problem.limits)
    for k in range(count):
        least = smallest_given(problem, k, [j for j in range(count) if j != k])
        if least is not None:
            return _conflict(problem, k, [j for j in range(count) if j != k], least)
    for k in range(1, count):
        least = smallest_given(problem, k, list(range(k)))
        if least is not None and least > problem.limits[k][1]:
            return _conflict(problem, k, list(range(k)), least)
    raise AssertionError("explain_infeasible was asked about a problem that has an assignment")


def smallest_given(problem: Problem, limit: int, others: list[int]) -> int | None:
    """The least total cost under one limit while ``others`` hold; None when they cannot hold together."""
    kept = _first_free(problem, [limit, *others])
    arrays = Arrays.of(kept)
    try:
        found = minimize(arrays, arrays.costs[:, 0].astype(float), Settings())
    except NoAssignment:
        return None
    return kept.cost(found.assignment)[0]


def _first_free(problem: Problem, order: list[int]) -> Problem:
    """The problem under some of its limits, the first of them without effect."""
    choices = tuple(
        Choice(one.name, tuple(replace(o, costs=tuple(o.costs[k] for k in order)) for o in one.options))
        for one in problem.choices
    )
    free = sum(max(option.costs[0] for option in one.options) for one in choices)
    limits = tuple(problem.limits[k] for k in order)
    return replace(problem, choices=choices, limits=((limits[0][0], free), *limits[1:]), pairs=None)


def _conflict(problem: Problem, limit: int, others: list[int], least: int) -> InfeasibleBudget:
    name, asked = problem.limits[limit]
    held = ", ".join(f"{problem.limits[k][0]} <= {problem.limits[k][1]:,}" for k in others)
    return InfeasibleBudget(
        f"The limit {name} = {asked:,} cannot be met while {held}: the smallest is {least:,}.", name, least
    )
