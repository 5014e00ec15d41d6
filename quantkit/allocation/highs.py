"""Integer program through HiGHS (``scipy.optimize.milp``)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from quantkit.allocation.arrays import Arrays
from quantkit.allocation.problem import Floats, Found, Integers, Problem
from quantkit.allocation.registry import NoAssignment, Settings, SolverGaveUp, solver
from quantkit.allocation.rows import Rows, rescaled

_ITERATION_LIMIT, _INFEASIBLE = 1, 2
_TIGHTENINGS = 20


@solver("highs")
def highs(problem: Problem, settings: Settings) -> Found:
    """Minimize the sum of damages."""
    arrays = Arrays.of(problem)
    return minimize(arrays, arrays.damage, settings)


def minimize(arrays: Arrays, score: Floats, settings: Settings) -> Found:
    """The assignment of least total ``score`` within the limits, with a lower bound in its unit.

    HiGHS accepts rows that are violated by its tolerance. An answer that breaks a limit in exact integers is refused
    and the limit tightened by what it was broken. Raises NoAssignment or SolverGaveUp."""
    rows = Rows.of(arrays)
    scaled, scale, shift = rescaled(score, arrays)
    most, bound = rows.most.copy(), -math.inf
    for _ in range(_TIGHTENINGS):
        result = _run(rows, scaled, most, settings)
        if result.status == _INFEASIBLE and bound == -math.inf:
            raise NoAssignment("HiGHS: no assignment meets the limits.")
        if result.x is None:
            break
        bound = max(bound, float(result.mip_dual_bound) / scale + shift) if bound == -math.inf else bound
        positions = arrays.heaviest(result.x[: len(arrays.choice)])
        over = rows.below[:, positions].sum(axis=1) - rows.most
        if (over <= 0).all():
            return Found(arrays.assignment(positions), bound)
        most = most - np.maximum(over, 0)
    raise SolverGaveUp(
        f"HiGHS found no assignment within {settings.nodes} nodes. Try solver='swaps' or a looser budget."
    )


def _run(rows: Rows, scaled: Floats, most: Integers, settings: Settings) -> Any:
    """scipy's result of the integer program."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    starts = np.cumsum([0] + [len(positions) for positions, _, _ in rows.equal])
    flat = [k for positions, _, _ in rows.equal for k in positions]
    values = [v for _, coefficients, _ in rows.equal for v in coefficients]
    right = np.array([side for _, _, side in rows.equal])
    constraints = [LinearConstraint(csr_array((values, flat, starts), shape=(len(right), rows.size)), right, right)]
    if len(most):
        below = np.zeros((len(most), rows.size))
        below[:, : rows.below.shape[1]] = rows.below
        constraints.append(LinearConstraint(below, -np.inf, most))
    return milp(
        np.concatenate([scaled, np.zeros(rows.size - len(scaled))]),
        integrality=np.ones(rows.size),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": settings.gap, "node_limit": settings.nodes},
    )
