"""Exhaustive search: the combinations of each half of the choices are listed once.

The objective of any two of them is the sum of their own and one entry of a matrix product, so millions of combinations
take a second, pair terms and several limits included.
"""

from __future__ import annotations

import math
from itertools import product

import numpy as np

from quantkit.allocation.problem import Floats, Integers, Problem, SolverResult
from quantkit.allocation.problem_arrays import ProblemArrays
from quantkit.allocation.registry import NoAssignment

MOST_COMBINATIONS = 2**25
_MOST_IN_A_HALF = 2**17
_BLOCK = 2**21


def can_enumerate(arrays: ProblemArrays, most: int = MOST_COMBINATIONS) -> bool:
    """Whether there are at most so many combinations, and lists of their halves fit into memory."""
    sizes = _sizes(arrays)
    halves = [math.prod(sizes[k] for k in half) for half in _halves(sizes)]
    return math.prod(halves) <= most and max(halves) <= _MOST_IN_A_HALF


def enumerate_halves(problem: Problem) -> SolverResult:
    """The optimum, the first among equals. Raises NoAssignment when no combination meets the limits."""
    arrays = ProblemArrays.of(problem)
    pairs = np.diag(2 * arrays.damage) if problem.pairs is None else problem.pairs
    parts = [_component_combinations(arrays, k) for k in range(int(arrays.component.max(initial=-1)) + 1)]
    left, right = (_joined([parts[k] for k in half]) for half in _halves([len(part) for part in parts]))
    costs = [arrays.costs[half].sum(axis=1) for half in (left, right)]
    facing = pairs @ _indicator(right, len(pairs)).T
    own = [_own_terms(pairs, half) for half in (left, right)]
    lowest, best = np.inf, (0, 0)
    rows = max(1, _BLOCK // len(right))
    for start in range(0, len(left), rows):
        block = slice(start, start + rows)
        total = own[0][block, None] + own[1] + _indicator(left[block], len(pairs)) @ facing
        for k, limit in enumerate(arrays.limits):
            total[costs[0][block, k, None] + costs[1][:, k] > limit] = np.inf
        if total.flat[at := int(total.argmin())] < lowest:
            lowest, best = float(total.flat[at]), (start + at // len(right), at % len(right))
    if lowest == np.inf:
        raise NoAssignment("No combination meets the limits.")
    assignment = arrays.assignment(np.sort(np.concatenate([left[best[0]], right[best[1]]])))
    return SolverResult(assignment, problem.objective(assignment))


def _sizes(arrays: ProblemArrays) -> list[int]:
    """Number of consistent combinations of every component."""
    sizes = [0] * (int(arrays.component.max(initial=-1)) + 1)
    for state, component in enumerate(arrays.component):
        sizes[component] += math.prod(np.bincount(arrays.cell)[arrays.state == state].tolist())
    return sizes


def _halves(sizes: list[int]) -> tuple[list[int], list[int]]:
    """Components in two parts with about as many combinations each."""
    halves: tuple[list[int], list[int]] = ([], [])
    totals = [0.0, 0.0]
    for k in sorted(range(len(sizes)), key=lambda k: -sizes[k]):
        smaller = int(totals[1] < totals[0])
        halves[smaller].append(k)
        totals[smaller] += math.log(sizes[k])
    return halves


def _component_combinations(arrays: ProblemArrays, component: int) -> Integers:
    """(combinations, choices) positions of every consistent combination of the choices of one component."""
    combinations: list[tuple[int, ...]] = []
    for state in np.flatnonzero(arrays.component == component):
        cells = [np.flatnonzero(arrays.cell == cell).tolist() for cell in np.flatnonzero(arrays.state == state)]
        combinations.extend(product(*cells))
    return np.array(combinations, dtype=np.int64)


def _joined(parts: list[Integers]) -> Integers:
    """Positions of every combination of rows of the parts."""
    joined = np.zeros((1, 0), dtype=np.int64)
    for part in parts:
        joined = np.hstack([np.repeat(joined, len(part), axis=0), np.tile(part, (len(joined), 1))])
    return joined


def _own_terms(pairs: Floats, positions: Integers) -> Floats:
    """Half the sum of the matrix over each row of positions."""
    own = np.zeros(len(positions))
    for column in positions.T:
        own += pairs[column[:, None], positions].sum(axis=1)
    return 0.5 * own


def _indicator(positions: Integers, count: int) -> Floats:
    indicator = np.zeros((len(positions), count))
    np.put_along_axis(indicator, positions, 1.0, axis=1)
    return indicator
