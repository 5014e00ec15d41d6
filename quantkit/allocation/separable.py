"""The least sum of damages by the first solver that succeeds."""

from __future__ import annotations

from quantkit.allocation.dynamic_program import dp
from quantkit.allocation.highs import highs
from quantkit.allocation.problem import Problem, SolverResult
from quantkit.allocation.pulp_cbc import pulp_cbc
from quantkit.allocation.registry import NoAssignment, Settings, SolverGaveUp


def least_sum(problem: Problem, settings: Settings) -> SolverResult:
    """CBC's result; HiGHS', then that of the dynamic program, where a solver gives up or calls a problem infeasible.

    Raises NoAssignment only when no solver finds an assignment and one of them proves that there is none."""
    refusals: list[NoAssignment | SolverGaveUp] = []
    for attempt in (pulp_cbc, highs, dp):
        try:
            return attempt(problem, settings)
        except (NoAssignment, SolverGaveUp) as refusal:
            refusals.append(refusal)
    raise next((r for r in refusals if isinstance(r, NoAssignment)), refusals[0])
