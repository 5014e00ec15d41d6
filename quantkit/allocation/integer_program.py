"""The least sum of damages by a solver of linear integer programs, its answers checked in exact integers.

Solvers work in floating point with absolute tolerances near 1e-6. Damages are therefore shifted and scaled before they
see them; options too costly to be part of the best plan, which would set the scale, are left out in a second run; and
an assignment that breaks a limit by the tolerance is refused and the limit tightened."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from quantkit.allocation.constraint_rows import ConstraintRows, rescaled, spread
from quantkit.allocation.problem import Floats, Integers, Problem, SolverResult
from quantkit.allocation.problem_arrays import ProblemArrays
from quantkit.allocation.registry import NoAssignment, SolverGaveUp
from quantkit.allocation.subproblem import original, subproblem

_TIGHTENINGS = 20
_WORTH_ANOTHER_RUN = 0.03

# (rows, scores, right sides of the limits) -> (value of every variable, lower bound of the total score).
# Raises NoAssignment or SolverGaveUp.
Run = Callable[[ConstraintRows, Floats, Integers], tuple[Floats, float]]


def minimize_sum(problem: Problem, run: Run) -> SolverResult:
    """The assignment of least total damage within the limits of a reduced problem, and a lower bound."""
    if not problem.choices:  # solvers refuse programs without variables
        if not problem.within_limits(()):
            raise NoAssignment("Nothing can be chosen, and a limit is negative.")
        return SolverResult((), 0.0)
    arrays = ProblemArrays.of(problem)
    _, forced = arrays.forced(arrays.damage)
    best, largest = _solve(problem, run), spread(arrays)
    while True:
        lowest = problem.separable_objective(best.assignment)
        mask = forced <= lowest + 1e-9 * abs(lowest)
        mask[problem.positions(best.assignment)] = True
        kept = subproblem(problem, mask)
        if kept is None or spread(ProblemArrays.of(kept[0])) >= _WORTH_ANOTHER_RUN * largest:
            return best
        part, mask = kept
        largest = spread(ProblemArrays.of(part))
        try:
            again = _solve(part, run)
        except (NoAssignment, SolverGaveUp):
            return best
        both = best.assignment, original(problem, mask, again.assignment)
        best = SolverResult(min(both, key=problem.separable_objective), max(best.bound, min(again.bound, lowest)))


def _solve(problem: Problem, run: Run) -> SolverResult:
    """An assignment within the limits from one or more runs, and a lower bound from the first of them."""
    arrays = ProblemArrays.of(problem)
    rows = ConstraintRows.of(arrays)
    scores, scale, shift = rescaled(arrays)
    most, bound = rows.most.copy(), -math.inf
    for attempt in range(_TIGHTENINGS):
        try:
            values, scaled_bound = run(rows, scores, most)
        except NoAssignment:
            if attempt:
                break
            raise
        bound = bound if attempt else max(scaled_bound, 0.0) / scale + shift  # no score is negative
        _, positions = arrays.best(-values[: len(arrays.choice)])
        over = arrays.costs[positions].sum(axis=0) - arrays.limits
        if (over <= 0).all():
            return SolverResult(arrays.assignment(positions), bound)
        most = most - np.maximum(over, 0)
    raise SolverGaveUp("The solver's answers break the limits by more than its tolerance. Try another solver.")
