"""Integer program through PuLP and the CBC that comes with it: the solver HAWQ-V3 uses, with its answers checked."""

from __future__ import annotations

import numpy as np

from quantkit.allocation.arrays import Arrays
from quantkit.allocation.problem import Found, Problem
from quantkit.allocation.registry import NoAssignment, Settings, SolverGaveUp, solver
from quantkit.allocation.rows import Rows, rescaled

_TIGHTENINGS = 20


@solver("pulp")
def pulp_cbc(problem: Problem, settings: Settings) -> Found:
    """Minimize the sum of damages: one thread, fixed seeds, stops at a gap or a number of nodes.

    CBC's answer counts only once it meets the limits in exact integers; a limit it broke by its tolerance is
    tightened."""
    arrays = Arrays.of(problem)
    rows = Rows.of(arrays)
    scaled, _, _ = rescaled(arrays.damage, arrays)
    most, proven = rows.most.copy(), True
    for _ in range(_TIGHTENINGS):
        values, optimal = _run(rows, scaled.tolist(), most.tolist(), settings, proven)
        positions = arrays.heaviest(np.array(values[: len(arrays.choice)]))
        over = rows.below[:, positions].sum(axis=1) - rows.most
        if (over <= 0).all():
            assignment = arrays.assignment(positions)
            exact = optimal and proven and settings.gap == 0.0
            return Found(assignment, problem.separable_objective(assignment)) if exact else Found(assignment)
        most, proven = most - np.maximum(over, 0), False
    raise SolverGaveUp("CBC's answers break the limits by more than its tolerance. Try solver='highs'.")


def _run(
    rows: Rows, scores: list[float], most: list[int], settings: Settings, first: bool
) -> tuple[list[float], bool]:
    """(variable values, whether CBC calls them optimal)."""
    import pulp

    model = pulp.LpProblem("allocation", pulp.LpMinimize)
    variables = [pulp.LpVariable(f"v{k}", cat=pulp.LpBinary) for k in range(rows.size)]
    model += pulp.LpAffineExpression(zip(variables, scores, strict=False))
    for positions, values, side in rows.equal:
        model += pulp.LpAffineExpression([(variables[k], v) for k, v in zip(positions, values, strict=True)]) == side
    for costs, limit in zip(rows.below.tolist(), most, strict=True):
        model += pulp.LpAffineExpression(zip(variables, costs, strict=False)) <= limit
    command = pulp.PULP_CBC_CMD(
        msg=False, threads=1, gapRel=settings.gap, maxNodes=settings.nodes, options=["randomSeed 1", "randomCbcSeed 1"]
    )
    status = model.solve(command)
    if status == pulp.LpStatusInfeasible and first:
        raise NoAssignment("CBC: no assignment meets the limits.")
    if any(variable.value() is None for variable in variables) or model.sol_status not in (
        pulp.LpSolutionOptimal,
        pulp.LpSolutionIntegerFeasible,
    ):
        raise SolverGaveUp(f"CBC ended ({pulp.LpStatus[status]}) without an assignment. Try solver='highs'.")
    return [float(variable.value()) for variable in variables], model.sol_status == pulp.LpSolutionOptimal
