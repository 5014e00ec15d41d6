"""Exact dynamic program for one limit, in pure Python: the twin of the integer programs, and their fallback.

Best damage for every total cost, one choice after the other, as rate-distortion pruning allocates; costs come divided
by their greatest common divisor. Only totals that occur are kept, and of them only those that can still beat the best
vertex of the convex hull, measured by the price of the limit there, which leaves few."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from quantkit.allocation.convex_hull import hull
from quantkit.allocation.problem import Integers, Problem, SolverResult
from quantkit.allocation.problem_arrays import ProblemArrays
from quantkit.allocation.registry import NoAssignment, Settings, SolverGaveUp, solver

_MOST_STATES = 300_000


class Link(NamedTuple):
    """The options of a state, the last first: states share their beginnings."""

    before: Link | None
    position: int


class State(NamedTuple):
    """Least damage at a total cost, and how it is reached."""

    cost: int
    damage: float
    link: Link | None


@solver("dp")
def dp(problem: Problem, settings: Settings) -> SolverResult:
    """The least sum of damages under one limit; gives up with several, or with too many totals to keep."""
    if len(problem.limits) > 1:
        names = ", ".join(name for name, _ in problem.limits)
        raise SolverGaveUp(f"The dynamic program takes one limit, this plan has {names}. Try solver='highs'.")
    arrays = ProblemArrays.of(problem)
    costs = arrays.costs[:, 0] if problem.limits else np.zeros(len(arrays.damage), dtype=np.int64)
    front = _last_front(arrays, costs, problem.limits[0][1] if problem.limits else 0)
    if not front:
        raise NoAssignment("No assignment meets the limit.")
    positions, link = [], front[-1].link
    while link is not None:
        positions.append(link.position)
        link = link.before
    assignment = arrays.assignment(np.sort(np.array(positions, dtype=np.int64)))
    return SolverResult(assignment, problem.separable_objective(assignment))


def _last_front(arrays: ProblemArrays, costs: Integers, limit: int) -> list[State]:
    """The states of all choices within the limit that may be optimal, cheapest first."""
    price, slack = _price_and_slack(arrays, costs, limit)
    minimum, _ = arrays.cell_minimum(arrays.damage + price * costs)
    total = arrays.state_sum(minimum)
    front, floor = [State(0, 0.0, None)], 0.0
    for component in range(int(arrays.component.max(initial=-1)) + 1):
        states = np.flatnonzero(arrays.component == component)
        reached: list[State] = []
        for state in states:
            ceiling = floor + slack - float(total[state] - total[states].min())
            part = front
            for cell in np.flatnonzero(arrays.state == state):
                ceiling += float(minimum[cell])
                inside = np.flatnonzero(arrays.cell == cell)
                options = list(
                    zip(costs[inside].tolist(), arrays.damage[inside].tolist(), inside.tolist(), strict=True)
                )
                part = _undominated(
                    State(before.cost + cost, before.damage + damage, Link(before.link, position))
                    for before in part
                    for cost, damage, position in options
                    if before.cost + cost <= limit and before.damage + damage + price * (before.cost + cost) <= ceiling
                )
            reached += part
        floor += float(total[states].min())
        front = _undominated(reached)
    return front


def _undominated(states: Iterable[State]) -> list[State]:
    """The states that no other matches in cost and damage, cheapest first. Raises SolverGaveUp when too many."""
    kept: list[State] = []
    for state in sorted(states, key=lambda state: state[:2]):
        if not kept or state.damage < kept[-1].damage:
            kept.append(state)
    if len(kept) > _MOST_STATES:
        raise SolverGaveUp(f"The dynamic program would keep over {_MOST_STATES:,} totals. Try solver='highs'.")
    return kept


def _price_and_slack(arrays: ProblemArrays, costs: Integers, limit: int) -> tuple[float, float]:
    """(damage per cost where the hull crosses the limit, how far above the least priced damage an optimum can be)."""
    best = None
    for point in hull(arrays, costs):
        if point.cost > limit:
            break
        best = point
    else:
        return 0.0, 1e-12 * abs(best.damage) if best else 0.0
    if best is None:
        return 0.0, math.inf
    price = (best.damage - point.damage) / (point.cost - best.cost)
    slack = price * (limit - best.cost)
    return price, slack * (1 + 1e-9) + 1e-12 * (abs(best.damage) + price * limit)
