"""The linear rows of a problem, as both integer-program solvers get them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantkit.allocation.problem import Floats, Integers
from quantkit.allocation.problem_arrays import ProblemArrays


@dataclass(frozen=True, eq=False)
class ConstraintRows:
    """``size`` binary variables: one per option, then one per state of choices that must agree.

    ``equal``: (positions, values, right side) of equality rows. ``below``: integer coefficients (limits, options), at
    most ``most``."""

    size: int
    equal: list[tuple[list[int], list[float], float]]
    below: Integers
    most: Integers

    @classmethod
    def of(cls, arrays: ProblemArrays) -> ConstraintRows:
        options, states = len(arrays.damage), np.bincount(arrays.component)
        free = [s for s in range(len(arrays.component)) if states[arrays.component[s]] > 1]
        variable = {s: options + k for k, s in enumerate(free)}
        equal = []
        for cell, state in enumerate(arrays.state):
            inside = np.flatnonzero(arrays.cell == cell).tolist()
            if state in variable:
                equal.append(([*inside, variable[state]], [1.0] * len(inside) + [-1.0], 0.0))
            else:
                equal.append((inside, [1.0] * len(inside), 1.0))
        for component in np.flatnonzero(states > 1):
            members = [variable[s] for s in free if arrays.component[s] == component]
            equal.append((members, [1.0] * len(members), 1.0))
        return cls(options + len(free), equal, arrays.costs.T, arrays.limits)

    def matrices(self) -> tuple[Any, Floats, Floats]:
        """(equality rows as a sparse matrix, their right sides, limits as a matrix), as scipy takes them."""
        from scipy.sparse import csr_array

        starts = np.cumsum([0] + [len(positions) for positions, _, _ in self.equal])
        flat = [k for positions, _, _ in self.equal for k in positions]
        values = [v for _, coefficients, _ in self.equal for v in coefficients]
        right = np.array([side for _, _, side in self.equal])
        below = np.zeros((len(self.most), self.size))
        below[:, : self.below.shape[1]] = self.below
        return csr_array((values, flat, starts), shape=(len(right), self.size)), right, below


def spread(arrays: ProblemArrays) -> float:
    """The largest distance of a damage from the smallest of its choice."""
    floor = np.minimum.reduceat(arrays.damage, arrays.offsets[:-1])
    return float((arrays.damage - floor[arrays.choice]).max(initial=0.0))


def rescaled(arrays: ProblemArrays) -> tuple[Floats, float, float]:
    """(scores, scale, shift): damages shifted to start at 0 in every choice and scaled to at most 10,000.

    Solvers stop at absolute tolerances near 1e-6, so damages of 1e-7 or 1e9 would be decided by rounding.
    A total t of the scores is t / scale + shift in the old unit.
    """
    floor = np.minimum.reduceat(arrays.damage, arrays.offsets[:-1])
    largest = spread(arrays)
    scale = 1e4 / largest if largest > 0 else 1.0
    return (arrays.damage - floor[arrays.choice]) * scale, scale, math.fsum(floor)
