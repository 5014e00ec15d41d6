"""Which limit cannot be met, and the least that can be reached."""

from __future__ import annotations

from dataclasses import dataclass, replace

from quantkit.allocation.highs import highs
from quantkit.allocation.presolve import Presolved
from quantkit.allocation.problem import Option, Problem
from quantkit.allocation.problem_arrays import ProblemArrays
from quantkit.allocation.registry import NoAssignment, Settings, SolverGaveUp
from quantkit.errors import InfeasibleBudget


@dataclass(frozen=True)
class Conflict:
    """The limit ``name`` cannot be met while those of ``held`` hold; ``smallest`` is the least its cost can be then,
    in the units of the original problem."""

    name: str
    smallest: int
    held: tuple[str, ...]


class OutOfReach(InfeasibleBudget):
    """No assignment meets the limits of a problem; ``conflict`` says which limit, and while which others hold."""

    def __init__(self, message: str, conflict: Conflict) -> None:
        super().__init__(message, conflict.name, conflict.smallest)
        self.conflict = conflict


def out_of_reach(problem: Problem) -> list[int]:
    """The limits of a reduced problem that lie below the least their cost can be."""
    arrays = ProblemArrays.of(problem)
    return [k for k, (_, limit) in enumerate(problem.limits) if arrays.smallest(k) > limit]


def blame(reduced: Presolved) -> Conflict:
    """A limit that cannot be met while all others hold, one out of reach by itself first. Where there is none, the
    first that cannot be met with those before it.

    Raises SolverGaveUp when nothing is wrong with the problem."""
    problem = reduced.problem
    names, count = [name for name, _ in problem.limits], len(problem.limits)
    alone = out_of_reach(problem)
    attempts = [(k, [j for j in range(count) if j != k]) for k in [*alone, *range(count)]]
    for k, held in [*attempts, *((k, list(range(k))) for k in range(count))]:
        least = smallest_given(problem, k, held)
        if least is not None and least > problem.limits[k][1]:
            return Conflict(names[k], reduced.asked_cost(k, least), tuple(names[j] for j in held))
    raise SolverGaveUp("The solver found no assignment, but there is one. Try solver='highs'.")


def smallest_given(problem: Problem, limit: int, held: list[int]) -> int | None:
    """The least total cost under one limit while those of ``held`` hold; None when they cannot hold together."""
    if not held:
        return ProblemArrays.of(problem).smallest(limit)

    def costing(_: int, option: Option) -> Option:
        return replace(option, damage=float(option.costs[limit]), costs=tuple(option.costs[k] for k in held))

    choices = tuple(one.with_options(costing) for one in problem.choices)
    least = replace(problem, choices=choices, limits=tuple(problem.limits[k] for k in held), pairs=None)
    try:
        return problem.cost(highs(least, Settings()).assignment)[limit]
    except NoAssignment:
        return None
