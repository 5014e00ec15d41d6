"""Integer program through HiGHS (``scipy.optimize.milp``)."""

from __future__ import annotations

import numpy as np

from quantkit.allocation.constraint_rows import ConstraintRows
from quantkit.allocation.integer_program import minimize_sum
from quantkit.allocation.problem import Floats, Integers, Problem, SolverResult
from quantkit.allocation.registry import NoAssignment, Settings, SolverGaveUp, solver

_INFEASIBLE = 2
_TOLERANCE = 1e-6


@solver("highs")
def highs(problem: Problem, settings: Settings) -> SolverResult:
    """Minimize the sum of damages; stops at a gap or a number of nodes."""

    def run(rows: ConstraintRows, scores: Floats, most: Integers) -> tuple[Floats, float]:
        from scipy.optimize import Bounds, LinearConstraint, milp

        equal, right, below = rows.matrices()
        constraints = [LinearConstraint(equal, right, right), LinearConstraint(below, -np.inf, most)]
        result = milp(
            np.concatenate([scores, np.zeros(rows.size - len(scores))]),
            integrality=np.ones(rows.size),
            bounds=Bounds(0, 1),
            constraints=constraints if len(most) else constraints[:1],
            # As fast here without presolve, with which HiGHS 1.12 often prints a line of its own; so it rarely does.
            options={"mip_rel_gap": settings.gap, "node_limit": settings.nodes, "presolve": False},
        )
        if result.status == _INFEASIBLE:
            raise NoAssignment("HiGHS: no assignment meets the limits.")
        if result.x is None:
            raise SolverGaveUp(
                f"HiGHS has no assignment within {settings.nodes} nodes. Try solver='swaps' or a looser budget."
            )
        return result.x, float(result.mip_dual_bound) - _TOLERANCE

    return minimize_sum(problem, run)
