"""Integer program through PuLP and the CBC that comes with it: the solver HAWQ-V3 uses, with its answers checked."""

from __future__ import annotations

import math
import warnings
from tempfile import TemporaryDirectory

import numpy as np

from quantkit.allocation.constraint_rows import ConstraintRows
from quantkit.allocation.integer_program import minimize_sum
from quantkit.allocation.problem import Floats, Integers, Problem, SolverResult
from quantkit.allocation.registry import NoAssignment, Settings, SolverGaveUp, solver

_TOLERANCE = 1e-6
# Fixed seeds; CBC's default is to overlook improvements below 1e-5.
_OPTIONS = ("randomSeed 1", "randomCbcSeed 1", "increment 1e-9")
# Its preprocessing (2.10.3) calls answers optimal that are not, in about one of a thousand small problems.
_SOUND = (*_OPTIONS, "preprocess off")


class _Crashed(Exception):
    """CBC ended without a result."""


@solver("pulp")
def pulp_cbc(problem: Problem, settings: Settings) -> SolverResult:
    """Minimize the sum of damages; stops at a gap or a number of nodes."""

    def run(rows: ConstraintRows, scores: Floats, most: Integers) -> tuple[Floats, float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # PuLP 3.3 announces 4.0, which setup.cfg excludes
            values, optimal = _run(rows, scores.tolist(), most.tolist(), settings)
        total = math.fsum(values[: len(scores)] * scores)
        return values, total * (1 - settings.gap) - _TOLERANCE if optimal else -math.inf

    return minimize_sum(problem, run)


def _run(rows: ConstraintRows, scores: list[float], most: list[int], settings: Settings) -> tuple[Floats, bool]:
    """(variable values, whether they are optimal)."""
    try:
        return _attempt(rows, scores, most, settings, _SOUND)
    except _Crashed:
        # Without its preprocessing CBC crashes on some problems that have no answer; with it, it says so.
        try:
            return _attempt(rows, scores, most, settings, _OPTIONS)[0], False
        except _Crashed as error:
            raise SolverGaveUp(f"CBC did not run ({error}). Try solver='highs'.") from error


def _attempt(
    rows: ConstraintRows, scores: list[float], most: list[int], settings: Settings, options: tuple[str, ...]
) -> tuple[Floats, bool]:
    """(variable values, whether CBC calls them optimal)."""
    import pulp

    model = pulp.LpProblem("allocation", pulp.LpMinimize)
    variables = [pulp.LpVariable(f"v{k}", cat=pulp.LpBinary) for k in range(rows.size)]
    model += pulp.LpAffineExpression(zip(variables, scores, strict=False))
    for positions, values, side in rows.equal:
        model += pulp.LpAffineExpression([(variables[k], v) for k, v in zip(positions, values, strict=True)]) == side
    for costs, limit in zip(rows.below.tolist(), most, strict=True):
        model += pulp.LpAffineExpression(zip(variables, costs, strict=False)) <= limit
    # Not threads=1: that is CBC's parallel search with one worker, which now and then sleeps for ten seconds.
    command = pulp.PULP_CBC_CMD(msg=False, gapRel=settings.gap, maxNodes=settings.nodes, options=list(options))
    with TemporaryDirectory() as command.tmpDir:  # a crash would leave files behind
        try:
            status = model.solve(command)
        except pulp.PulpSolverError as error:
            raise _Crashed(str(error)) from error
    if status == pulp.LpStatusInfeasible:
        raise NoAssignment("CBC: no assignment meets the limits.")
    usable = (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible)
    if model.sol_status not in usable or any(variable.value() is None for variable in variables):
        raise SolverGaveUp(f"CBC ended ({pulp.LpStatus[status]}) without an assignment. Try solver='highs'.")
    return np.array([variable.value() for variable in variables]), model.sol_status == pulp.LpSolutionOptimal
