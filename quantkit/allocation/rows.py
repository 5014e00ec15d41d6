"""The linear rows of a problem, as both integer-program solvers get them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from quantkit.allocation.arrays import Arrays
from quantkit.allocation.problem import Floats, Integers


@dataclass(frozen=True, eq=False)
class Rows:
    """``size`` binary variables: one per option, then one per state of choices that must agree.

    ``equal``: (positions, values, right side) of equality rows. ``below``: integer coefficients (limits, options)
    divided by their greatest common divisor, at most ``most``."""

    size: int
    equal: list[tuple[list[int], list[float], float]]
    below: Integers
    most: Integers

    @classmethod
    def of(cls, arrays: Arrays) -> Rows:
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
        divisor = [max(math.gcd(*(int(c) for c in column)), 1) for column in arrays.costs.T]
        by = np.array(divisor, dtype=np.int64)
        return cls(options + len(free), equal, (arrays.costs // by).T, arrays.limits // by)


def rescaled(score: Floats, arrays: Arrays) -> tuple[Floats, float, float]:
    """(scores, scale, shift): shifted to start at 0 in every choice and scaled to at most 10,000.

    Solvers stop at absolute tolerances near 1e-6, so damages of 1e-7 or 1e9 would be decided by rounding.
    A total t of the new scores is t / scale + shift in the old unit.
    """
    floor = np.minimum.reduceat(score, arrays.offsets[:-1])
    above = score - floor[arrays.choice]
    largest = float(above.max(initial=0.0))
    scale = 1e4 / largest if largest > 0 else 1.0
    return above * scale, scale, math.fsum(floor)
