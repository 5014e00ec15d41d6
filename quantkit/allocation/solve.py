"""The one entry to the solvers: whatever they return is recounted in exact integers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from quantkit.allocation import greedy, ranking, swaps, uniform  # noqa: F401  # registered by name
from quantkit.allocation.feasibility import Conflict, OutOfReach, blame, out_of_reach
from quantkit.allocation.presolve import Presolved, presolve
from quantkit.allocation.problem import Problem, Solution, SolverResult
from quantkit.allocation.problem_arrays import ProblemArrays
from quantkit.allocation.quadratic import quadratic
from quantkit.allocation.registry import PAIR_SOLVERS, SOLVERS, NoAssignment, Settings, solver
from quantkit.allocation.relaxation import relax
from quantkit.allocation.separable import least_sum
from quantkit.errors import InvalidRequest, QuantkitError, did_you_mean

# Integer programs leave 1e-10 of the largest damage open, which is at most some 30 times the objective (see program).
PROVEN_GAP = 1e-8


@solver("auto", pairs=True)
def auto(problem: Problem, settings: Settings) -> SolverResult:
    """An integer program on the damages alone; with pair terms the exact quadratic where small enough, else swaps."""
    return least_sum(problem, settings) if problem.pairs is None else quadratic(problem, settings)


def require_solver(name: str) -> None:
    """Raise InvalidRequest for a name that is no solver's."""
    if name not in SOLVERS:
        raise InvalidRequest(
            f"Unknown solver {name!r}; known: {', '.join(SOLVERS)}.{did_you_mean(name, list(SOLVERS))}"
        )


def solve(problem: Problem, solver: str = "auto", settings: Settings | None = None) -> Solution:
    """The assignment with the least objective a solver finds within the limits, verified in exact integers.

    Solvers of sums minimize the damages alone; objective, bound and gap are those of the problem asked.
    Raises OutOfReach (an InfeasibleBudget) with the limit that cannot be met, SolverGaveUp when the solver ended
    without an answer, InvalidRequest for an unknown solver."""
    require_solver(solver)
    settings = settings or Settings()
    reduced = presolve(problem)
    if out_of_reach(reduced.problem):
        raise _infeasible(problem, blame(reduced))
    if not problem.choices:
        return Solution((), 0.0, 0.0, 0.0, solver, True)

    whole_objective = problem.pairs is None or solver in PAIR_SOLVERS
    solved = reduced.problem if whole_objective else replace(reduced.problem, pairs=None)
    try:
        result = SOLVERS[solver](solved, replace(settings, order=_order(problem, reduced, settings.order)))
    except NoAssignment:
        raise _infeasible(problem, blame(reduced)) from None
    assignment = reduced.expand(result.assignment)
    if not problem.feasible(assignment):
        raise QuantkitError(f"Solver {solver!r} returned a plan that breaks a limit or a group. Please report this.")

    # A solver that saw the damages alone has bounded another objective; the relaxation bounds the one asked for.
    bound = result.bound if whole_objective else -math.inf
    if bound == -math.inf:
        bound = relax(reduced.problem, ProblemArrays.of(reduced.problem)).bound
    objective = problem.objective(assignment)
    bound = min(bound, objective)
    gap = 0.0 if bound == objective else (objective - bound) / max(abs(objective), 1e-300)
    return Solution(assignment, objective, bound, gap, solver, gap <= settings.gap + PROVEN_GAP)


def _infeasible(problem: Problem, conflict: Conflict) -> OutOfReach:
    limits = dict(problem.limits)
    held = ", ".join(f"{name} <= {limits[name]:,}" for name in conflict.held)
    given = f" while {held}" if held else ""
    return OutOfReach(
        f"The limit {conflict.name} = {limits[conflict.name]:,} cannot be met{given}: the smallest is "
        f"{conflict.smallest:,}.",
        conflict,
    )


def _order(problem: Problem, reduced: Presolved, order: Sequence[str]) -> tuple[str, ...]:
    """An order of choices as one of merged choices, each ranked by its first member."""
    owner = {
        problem.choices[i].name: new.name
        for new, back in zip(reduced.problem.choices, reduced.back, strict=True)
        for i, _ in back[0]
    }
    if unknown := [name for name in order if name not in owner]:
        raise InvalidRequest(
            f"The order names {unknown[0]!r}, which is not a choice.{did_you_mean(unknown[0], list(owner))}"
        )
    return tuple(dict.fromkeys(owner[name] for name in order))
