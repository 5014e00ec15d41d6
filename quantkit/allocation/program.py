"""The least sum of damages by a solver of linear integer programs, its answers checked in exact integers.

Solvers work in floating point with absolute tolerances near 1e-6. Damages are therefore shifted and scaled before they
see them; options too dear to be part of the best plan, which would set the scale, are left out in a second run; and an
answer that breaks a limit by the tolerance is refused and the limit tightened."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from quantkit.allocation.arrays import Arrays
from quantkit.allocation.problem import Floats, Found, Integers, Problem
from quantkit.allocation.registry import NoAssignment, SolverGaveUp
from quantkit.allocation.restrict import original, restricted
from quantkit.allocation.rows import Rows, rescaled, spread

_TIGHTENINGS = 20
_WORTH_ANOTHER_RUN = 0.03

# (rows, scores, right sides of the limits) -> (value of every variable, lower bound of the total score).
# Raises NoAssignment or SolverGaveUp.
Run = Callable[[Rows, Floats, Integers], tuple[Floats, float]]


def minimize_sum(problem: Problem, run: Run) -> Found:
    """The assignment of least total damage within the limits of a reduced problem, and a lower bound."""
    if not problem.choices:  # solvers refuse programs without variables
        if not problem.within_limits(()):
            raise NoAssignment("Nothing can be chosen, and a limit is negative.")
        return Found((), 0.0)
    arrays = Arrays.of(problem)
    _, forced = arrays.forced(arrays.damage)
    found, largest = _answer(problem, run), spread(arrays)
    while True:
        lowest = problem.separable_objective(found.assignment)
        mask = forced <= lowest + 1e-9 * abs(lowest)
        mask[problem.positions(found.assignment)] = True
        kept = restricted(problem, mask)
        if kept is None or spread(Arrays.of(kept[0])) >= _WORTH_ANOTHER_RUN * largest:
            return found
        part, mask = kept
        largest = spread(Arrays.of(part))
        try:
            again = _answer(part, run)
        except (NoAssignment, SolverGaveUp):
            return found
        both = found.assignment, original(problem, mask, again.assignment)
        found = Found(min(both, key=problem.separable_objective), max(found.bound, min(again.bound, lowest)))


def _answer(problem: Problem, run: Run) -> Found:
    """An assignment within the limits from one or more runs, and a lower bound from the first of them."""
    arrays = Arrays.of(problem)
    rows = Rows.of(arrays)
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
            return Found(arrays.assignment(positions), bound)
        most = most - np.maximum(over, 0)
    raise SolverGaveUp("The solver's answers break the limits by more than its tolerance. Try another solver.")
