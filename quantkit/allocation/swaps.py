"""Best-improvement swaps on the Gram prediction: one change, or one up and one down, from several starts, with
kicks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from quantkit.allocation.local_search import LocalSearch
from quantkit.allocation.problem import Problem, SolverResult
from quantkit.allocation.registry import Settings, solver
from quantkit.allocation.relaxation import relax
from quantkit.allocation.separable import least_sum

KICKS = 150


@solver("swaps", pairs=True)
def swaps(problem: Problem, settings: Settings) -> SolverResult:
    """Swap from the integer program's answer, the relaxation's and random ones; lower bound from the convex
    relaxation."""
    search = LocalSearch(problem)
    relaxation = relax(problem, search.arrays)
    program = least_sum(replace(problem, pairs=None), settings).assignment
    _, rounded = search.arrays.best(-relaxation.point)
    starts = [np.array(problem.positions(program), dtype=np.int64), rounded]
    best = search.improve(starts, np.random.default_rng(settings.seed), KICKS)
    return SolverResult(search.arrays.assignment(best), relaxation.bound)
