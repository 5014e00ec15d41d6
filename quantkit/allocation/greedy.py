"""Greedy: every choice at its least damage, then the downgrade of least damage per overuse removed, until all limits
hold."""

from __future__ import annotations

from quantkit.allocation.local_search import LocalSearch
from quantkit.allocation.problem import Problem, SolverResult
from quantkit.allocation.registry import Settings, SolverGaveUp, solver


@solver("greedy", pairs=True)
def greedy(problem: Problem, settings: Settings) -> SolverResult:
    """One downgrade at a time, pair terms counted as the plan then stands; never goes back."""
    search = LocalSearch(problem)
    _, positions = search.arrays.best(search.arrays.damage)
    search.place(positions)
    if not search.repair():
        raise SolverGaveUp("Greedy downgrades ended before all limits held. Try solver='auto'.")
    return SolverResult(search.arrays.assignment(search.positions))
