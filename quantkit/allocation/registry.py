"""Solvers by name: a dict and a decorator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quantkit.allocation.problem import Problem, SolverResult
from quantkit.errors import QuantkitError


class SolverGaveUp(QuantkitError):
    """A solver ended without an assignment that can be verified; other solvers may still find one."""


class NoAssignment(QuantkitError):
    """A solver proved that no assignment meets the limits; ``solve`` turns this into InfeasibleBudget."""


@dataclass(frozen=True)
class Settings:
    """Options of the solvers: the seed, when to stop, and an order of choices for ``by-rank``.

    ``gap`` is the relative distance to the bound that counts as optimal, ``nodes`` the most branch-and-bound nodes:
    limits in nodes, not in seconds, so that the same request gives the same answer on any machine. ``order``: choice
    names, the one that deserves the widest format first."""

    seed: int = 0
    gap: float = 0.0
    nodes: int = 100_000
    order: Sequence[str] = ()


Solver = Callable[[Problem, Settings], SolverResult]
SOLVERS: dict[str, Solver] = {}
PAIR_SOLVERS: set[str] = set()


def solver(name: str, pairs: bool = False) -> Callable[[Solver], Solver]:
    """Register a solver of presolved problems under ``name``; ``pairs``: it minimizes pair terms too."""

    def register(function: Solver) -> Solver:
        SOLVERS[name] = function
        if pairs:
            PAIR_SOLVERS.add(name)
        return function

    return register
