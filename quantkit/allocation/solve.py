"""The one door to the solvers: nothing leaves it that was not recounted."""

from __future__ import annotations

import math
from dataclasses import replace

from quantkit.allocation.arrays import Arrays
from quantkit.allocation.feasibility import explain_infeasible, require_each_limit
from quantkit.allocation.highs import highs
from quantkit.allocation.problem import Found, Problem, Solution
from quantkit.allocation.pulp_cbc import pulp_cbc
from quantkit.allocation.quadratic import quadratic
from quantkit.allocation.reduce import reduce
from quantkit.allocation.registry import PAIR_SOLVERS, SOLVERS, NoAssignment, Settings, SolverGaveUp, solver
from quantkit.allocation.relaxation import relax
from quantkit.errors import InvalidRequest, QuantkitError, did_you_mean

PROVEN_GAP = 1e-9


@solver("auto", pairs=True)
def auto(problem: Problem, settings: Settings) -> Found:
    """An integer program on the damages alone; with pair terms the exact quadratic where small enough, else swaps."""
    if problem.pairs is not None:
        return quadratic(problem, settings)
    try:
        return pulp_cbc(problem, settings)
    except SolverGaveUp:
        return highs(problem, settings)


def solve(problem: Problem, solver: str = "auto", settings: Settings | None = None) -> Solution:
    """The assignment with the least objective a solver finds within the limits, verified in exact integers.

    Solvers that know only sums minimize the damages alone; objective, bound and gap are those of the problem asked.
    Raises InfeasibleBudget with the limit that cannot be met, SolverGaveUp when the solver ended without an answer,
    InvalidRequest for an unknown solver."""
    if solver not in SOLVERS:
        raise InvalidRequest(
            f"Unknown solver {solver!r}; known: {', '.join(SOLVERS)}.{did_you_mean(solver, list(SOLVERS))}"
        )
    settings = settings or Settings()
    reduced = reduce(problem)
    require_each_limit(reduced.problem)
    knows_objective = problem.pairs is None or solver in PAIR_SOLVERS
    try:
        asked = reduced.problem if knows_objective else replace(reduced.problem, pairs=None)
        found = SOLVERS[solver](asked, settings)
    except NoAssignment:
        raise explain_infeasible(reduced.problem) from None
    assignment = reduced.expand(found.assignment)
    if not problem.feasible(assignment):
        raise QuantkitError(f"Solver {solver!r} returned a plan that breaks a limit or a group. Please report this.")
    bound = (
        found.bound
        if knows_objective and found.bound > -math.inf
        else relax(reduced.problem, Arrays.of(reduced.problem)).bound
    )
    objective = problem.objective(assignment)
    bound = min(bound, objective)
    gap = 0.0 if bound == objective else (objective - bound) / max(abs(objective), 1e-300)
    return Solution(assignment, objective, bound, gap, solver, gap <= PROVEN_GAP)
