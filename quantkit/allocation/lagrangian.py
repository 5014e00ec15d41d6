"""Lagrangian sweep: every price on the cost at once, and the best vertex of the convex hull that fits a budget."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from quantkit.allocation.arrays import Arrays
from quantkit.allocation.hull import hull
from quantkit.allocation.problem import Assignment, Found, Problem
from quantkit.allocation.reduce import reduce
from quantkit.allocation.registry import Settings, SolverGaveUp, solver
from quantkit.allocation.search import Search
from quantkit.errors import InvalidRequest


@solver("lagrangian")
def lagrangian(problem: Problem, settings: Settings) -> Found:
    """The vertex of least damage within the limits; several limits are priced in the proportion of their sizes."""
    arrays = Arrays.of(problem)
    single = len(problem.limits) == 1
    best = None
    for point in hull(arrays, arrays.costs[:, 0] if single else arrays.relative_cost):
        if arrays.within(np.array(point.positions, dtype=np.int64)):
            best = point
        elif single:
            break
    if best is None:
        raise SolverGaveUp("No vertex of the convex hull meets all limits. Try solver='highs'.")
    return Found(arrays.assignment(np.array(best.positions, dtype=np.int64)))


@dataclass(frozen=True)
class FrontPoint:
    """An assignment on the Pareto front: total cost and objective."""

    cost: int
    objective: float
    assignment: Assignment


def pareto_front(problem: Problem) -> list[FrontPoint]:
    """Cost against objective for every budget at once, cheapest first: the vertices of the convex hull for the one
    limit of a problem, whose amount does not matter.

    With pair terms the vertices are those of the damages alone, each improved by swaps that do not cost more; what
    another one beats is left out. Raises InvalidRequest for a problem with none or several limits."""
    if len(problem.limits) != 1:
        raise InvalidRequest(f"A front needs one limit to go along; the problem has {len(problem.limits)}.")
    reduced = reduce(replace(problem, limits=((problem.limits[0][0], -1),)))
    arrays = Arrays.of(reduced.problem)
    front: list[FrontPoint] = []
    for point in hull(arrays, arrays.costs[:, 0]):
        positions = np.array(point.positions, dtype=np.int64)
        if problem.pairs is not None:
            name = reduced.problem.limits[0][0]
            search = Search(replace(reduced.problem, limits=((name, int(point.cost)),)))
            positions = search.improve([positions], np.random.default_rng(0), kicks=0)
        assignment = reduced.expand(arrays.assignment(positions))
        cost, objective = problem.cost(assignment)[0], problem.objective(assignment)
        if front and objective >= front[-1].objective:
            continue
        while front and front[-1].cost >= cost:  # swaps may have made it cheaper than the one before
            front.pop()
        front.append(FrontPoint(cost, objective, assignment))
    return front
