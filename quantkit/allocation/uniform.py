"""Uniform: the same option for every choice, the widest that fits."""

from __future__ import annotations

import numpy as np

from quantkit.allocation.problem import Problem, SolverResult
from quantkit.allocation.problem_arrays import ProblemArrays
from quantkit.allocation.registry import Settings, SolverGaveUp, solver


@solver("uniform")
def uniform(problem: Problem, settings: Settings) -> SolverResult:
    """Every choice that offers the option of one name takes it, the others their cheapest; of the names that fit, the
    one that makes the plan cost most."""
    arrays = ProblemArrays.of(problem)
    names = [option.name for choice in problem.choices for option in choice.options]
    cheapest = arrays.relative_cost + 1e-9 * arrays.damage / max(float(np.abs(arrays.damage).max(initial=0.0)), 1e-300)
    plans = []
    for name in dict.fromkeys(names):
        named = np.array([other == name for other in names])
        offered = np.bincount(arrays.choice, weights=named)[arrays.choice] > 0
        total, positions = arrays.best(np.where(named | ~offered, cheapest, np.inf))
        if np.isfinite(total) and arrays.within(positions):
            plans.append((-float(arrays.relative_cost[positions].sum()), total, positions))
    if not plans:
        raise SolverGaveUp("No option taken by all choices meets the limits. Try solver='auto'.")
    return SolverResult(arrays.assignment(min(plans, key=lambda plan: plan[:2])[2]))
