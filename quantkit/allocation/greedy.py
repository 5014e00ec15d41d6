"""Greedy: every choice at its least damage, then the downgrade of least damage per overuse removed, until all limits
hold."""

from __future__ import annotations

from quantkit.allocation.problem import Found, Problem
from quantkit.allocation.registry import Settings, SolverGaveUp, solver
from quantkit.allocation.search import Search


@solver("greedy", pairs=True)
def greedy(problem: Problem, settings: Settings) -> Found:
    """One downgrade at a time, pair terms counted as the plan then stands; never goes back."""
    search = Search(problem)
    _, positions = search.arrays.best(search.arrays.damage)
    search.place(positions)
    if not search.repair():
        raise SolverGaveUp("Greedy downgrades ended before all limits held. Try solver='auto'.")
    return Found(search.arrays.assignment(search.positions))
