"""The quadratic objective exactly, where all combinations can be looked at; swaps with a bound where they cannot.

The combinations of each half of the choices are listed once. The objective of any two of them is the sum of their own
and one entry of a matrix product, so millions of combinations take a second, and the optimum is proven without a
bound."""

from __future__ import annotations

from itertools import product

import numpy as np

from quantkit.allocation.arrays import Arrays
from quantkit.allocation.problem import Floats, Found, Integers, Problem
from quantkit.allocation.registry import NoAssignment, Settings, solver
from quantkit.allocation.swaps import swaps

MOST_COMBINATIONS = 2**26
_BLOCK = 2**21


@solver("quadratic", pairs=True)
def quadratic(problem: Problem, settings: Settings) -> Found:
    """The proven optimum up to 2**26 combinations (13 choices of 4 options), else the best swaps find."""
    if problem.combinations > MOST_COMBINATIONS:
        return swaps(problem, settings)
    return enumerate_halves(problem)


def enumerate_halves(problem: Problem) -> Found:
    """Look at every combination. Raises NoAssignment when none meets the limits."""
    arrays = Arrays.of(problem)
    pairs = np.diag(2 * arrays.damage) if problem.pairs is None else problem.pairs
    left, right = (_combinations(arrays, half) for half in _halves(arrays))
    values = [
        0.5 * np.einsum("ij->i", pairs[half[:, :, None], half[:, None, :]].reshape(len(half), -1))
        for half in (left, right)
    ]
    costs = [arrays.costs[half].sum(axis=1) for half in (left, right)]
    inside = _indicator(right, len(arrays.damage)) @ pairs
    lowest, best = np.inf, (0, 0)
    rows = max(1, _BLOCK // len(right))
    for start in range(0, len(left), rows):
        stop = start + rows
        total = values[0][start:stop, None] + values[1] + _indicator(left[start:stop], len(arrays.damage)) @ inside.T
        for k, limit in enumerate(arrays.limits):
            total[costs[0][start:stop, k, None] + costs[1][:, k] > limit] = np.inf
        if total.flat[at := int(total.argmin())] < lowest:
            lowest, best = float(total.flat[at]), (start + at // len(right), at % len(right))
    if lowest == np.inf:
        raise NoAssignment("No combination meets the limits.")
    positions = np.sort(np.concatenate([left[best[0]], right[best[1]]]))
    assignment = arrays.assignment(positions)
    return Found(assignment, problem.objective(assignment))


def _halves(arrays: Arrays) -> tuple[list[int], list[int]]:
    """The components in two parts with about as many combinations each."""
    count = int(arrays.component.max(initial=-1)) + 1
    sizes = [len(_component_combinations(arrays, k)) for k in range(count)]
    halves: tuple[list[int], list[int]] = ([], [])
    totals = [1, 1]
    for k in sorted(range(count), key=lambda k: -sizes[k]):
        smaller = int(totals[1] < totals[0])
        halves[smaller].append(k)
        totals[smaller] *= sizes[k]
    return halves


def _component_combinations(arrays: Arrays, component: int) -> list[tuple[int, ...]]:
    """Positions of every consistent combination of the choices of one component."""
    combinations: list[tuple[int, ...]] = []
    for state in np.flatnonzero(arrays.component == component):
        cells = [np.flatnonzero(arrays.cell == cell).tolist() for cell in np.flatnonzero(arrays.state == state)]
        combinations.extend(product(*cells))
    return combinations


def _combinations(arrays: Arrays, components: list[int]) -> Integers:
    """(combinations, choices) positions of all combinations of some components."""
    parts = [_component_combinations(arrays, k) for k in components]
    rows = [sum(parts_taken, ()) for parts_taken in product(*parts)]
    return np.array(rows, dtype=np.int64).reshape(len(rows), -1)


def _indicator(positions: Integers, count: int) -> Floats:
    indicator = np.zeros((len(positions), count))
    np.put_along_axis(indicator, positions, 1.0, axis=1)
    return indicator
