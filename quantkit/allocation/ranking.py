"""By rank: what ranks first gets the widest option, as LayerwiseQuant spends its bits (arXiv 2406.17415)."""

from __future__ import annotations

import numpy as np

from quantkit.allocation.problem import Problem, SolverResult
from quantkit.allocation.problem_arrays import ProblemArrays
from quantkit.allocation.registry import Settings, SolverGaveUp, solver


@solver("by-rank")
def by_rank(problem: Problem, settings: Settings) -> SolverResult:
    """Every choice in turn takes the widest option that leaves room for all after it at their cheapest.

    With two options per choice that is a top fraction wide and the rest narrow. Choices that ``Settings.order`` does
    not name come last, those that suffer most at their cheapest option first."""
    arrays = ProblemArrays.of(problem)
    allowed = np.ones(len(arrays.damage), dtype=bool)
    total, positions = arrays.best(arrays.relative_cost)
    if not arrays.within(positions):
        raise SolverGaveUp("The cheapest plan does not meet all limits. Try solver='auto'.")
    for choice in _ranked(problem, arrays, settings):
        own = np.flatnonzero(arrays.choice == choice)
        for option in own[np.lexsort((arrays.damage[own], -arrays.relative_cost[own]))]:
            trial = allowed.copy()
            trial[own] = own == option
            total, completed = arrays.best(np.where(trial, arrays.relative_cost, np.inf))
            if np.isfinite(total) and arrays.within(completed):
                allowed, positions = trial, completed
                break
    return SolverResult(arrays.assignment(positions))


def _ranked(problem: Problem, arrays: ProblemArrays, settings: Settings) -> list[int]:
    """The choices in order, widest first."""
    _, cheapest = arrays.lowest(arrays.relative_cost)
    given = {name: k for k, name in enumerate(settings.order)}
    return sorted(
        range(len(problem.choices)),
        key=lambda i: (given.get(problem.choices[i].name, len(given)), -arrays.damage[cheapest[i]]),
    )
