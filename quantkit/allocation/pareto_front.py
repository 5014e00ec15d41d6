"""The Pareto front of a problem by a Lagrangian sweep: every price on the cost at once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from quantkit.allocation.convex_hull import hull
from quantkit.allocation.local_search import LocalSearch
from quantkit.allocation.presolve import presolve
from quantkit.allocation.problem import Assignment, Problem
from quantkit.allocation.problem_arrays import ProblemArrays
from quantkit.errors import InvalidRequest


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
    reduced = presolve(replace(problem, limits=((problem.limits[0][0], -1),)))
    arrays = ProblemArrays.of(reduced.problem)
    front: list[FrontPoint] = []
    for point in hull(arrays, arrays.costs[:, 0]):
        positions = np.array(point.positions, dtype=np.int64)
        if problem.pairs is not None:
            name = reduced.problem.limits[0][0]
            search = LocalSearch(replace(reduced.problem, limits=((name, int(point.cost)),)))
            positions = search.improve([positions], np.random.default_rng(0), kicks=0)
        assignment = reduced.expand(arrays.assignment(positions))
        cost, objective = problem.cost(assignment)[0], problem.objective(assignment)
        if front and objective >= front[-1].objective:
            continue
        while front and front[-1].cost >= cost:  # swaps may have made it cheaper than the vertex before it
            front.pop()
        front.append(FrontPoint(cost, objective, assignment))
    return front
