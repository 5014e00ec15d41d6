"""The lower convex hull of (cost, damage) over all assignments, limits ignored.

A vertex is what a price on the cost chooses, so the whole hull is a sum of the hulls of the choices: their edges,
steepest first (Shoham and Gersho, IEEE Trans. ASSP 36, 1988). Choices that must agree are summed for every tag, and
the hull of the union is taken."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from quantkit.allocation.problem import Floats, Integers
from quantkit.allocation.problem_arrays import ProblemArrays


class Point(NamedTuple):
    """What options cost and harm together, and their positions among all options."""

    cost: float
    damage: float
    positions: tuple[int, ...]


def hull(arrays: ProblemArrays, cost: Integers | Floats) -> Iterator[Point]:
    """Every vertex, cheapest first, as integers where the costs are; positions in the order of the choices."""
    for point in _summed([_component_hull(arrays, cost, k) for k in range(arrays.component.max(initial=-1) + 1)]):
        yield point._replace(positions=tuple(sorted(point.positions)))


def _component_hull(arrays: ProblemArrays, cost: Integers | Floats, component: int) -> list[Point]:
    """Hull of one choice, or of choices that must agree."""
    points: list[Point] = []
    for state in np.flatnonzero(arrays.component == component):
        cells = []
        for cell in np.flatnonzero(arrays.state == state):
            inside = np.flatnonzero(arrays.cell == cell)
            own = zip(cost[inside].tolist(), arrays.damage[inside].tolist(), inside.tolist(), strict=True)
            cells.append(lower_hull(Point(c, d, (k,)) for c, d, k in own))
        points.extend(_summed(cells))
    return lower_hull(points)


def lower_hull(points: Iterable[Point]) -> list[Point]:
    """The vertices of falling damage, cheapest first."""
    kept: list[Point] = []
    for point in sorted(points):
        if kept and point.damage >= kept[-1].damage:
            continue
        while len(kept) > 1 and _slope(kept[-2], point) <= _slope(kept[-2], kept[-1]):
            kept.pop()
        kept.append(point)
    return kept


def _slope(start: Point, end: Point) -> float:
    return (end.damage - start.damage) / (end.cost - start.cost)


def _summed(hulls: Sequence[list[Point]]) -> Iterator[Point]:
    """Vertices of the sum: all hulls at their cheapest, then one edge after the other, steepest first."""
    edges: list[tuple[float, int, int]] = []
    for i, points in enumerate(hulls):
        steepest = -math.inf
        for k in range(1, len(points)):
            steepest = max(steepest, _slope(points[k - 1], points[k]))
            edges.append((steepest, i, k))
    now = [points[0] for points in hulls]
    for _, i, k in [(0.0, 0, 0), *sorted(edges)]:
        if now:
            now[i] = hulls[i][k]
        yield Point(
            sum(point.cost for point in now),
            math.fsum(point.damage for point in now),
            tuple(k for point in now for k in point.positions),
        )
