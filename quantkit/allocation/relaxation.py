"""Lower bounds, and which options cannot be part of an optimum.

The quadratic form is convex (``pairs`` is positive semi-definite), so its tangent at any point lies below it. The
least value of a tangent plus prices on the limits over all assignments needs no search and bounds the objective,
whatever the point and the prices; at the optimum of the relaxation the bound is tightest. Two identities of one-hot
vectors raise it first: x*x = x moves a share of the diagonal into the linear part, and the form need be convex along
changes inside the choices only (quadratic convex reformulation, Billionnet and Elloumi, Math. Programming 109, 2007,
with one factor instead of a semi-definite program).

Forcing an option raises the bound; where it rises above the objective of a known assignment the option can be dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quantkit.allocation.constraint_rows import ConstraintRows, rescaled
from quantkit.allocation.interior_point import QuadraticProgram
from quantkit.allocation.problem import Floats, Problem
from quantkit.allocation.problem_arrays import ProblemArrays

_LARGEST_EIGENPROBLEM = 1200
_SAFETY = 1e-9
_TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Relaxation:
    """``bound`` of the objective of any feasible assignment; ``forced``: the same for those that take each option;
    ``point``: the weight of each option near the relaxed optimum."""

    bound: float
    forced: Floats
    point: Floats


def relax(problem: Problem, arrays: ProblemArrays) -> Relaxation:
    """The relaxation of a reduced problem, quadratic or separable."""
    most = arrays.limits.astype(np.float64)
    if problem.pairs is None:
        point, price = linear_optimum(arrays)
        slope, value = arrays.damage, float(arrays.damage @ point)
    else:
        curved, linear = _convexified(problem.pairs, arrays)
        point, price = _quadratic_optimum(curved, linear, arrays)
        slope = curved @ point + linear
        value = 0.5 * float(point @ curved @ point) + float(linear @ point)
    score = slope + arrays.costs @ price
    constant = value - float(slope @ point) - float(price @ most)
    total, forced = arrays.forced(score)
    safety = _SAFETY * (abs(value) + abs(float(slope @ point)) + float(price @ most))
    return Relaxation(total + constant - safety, forced + constant - safety, point)


def linear_optimum(arrays: ProblemArrays) -> tuple[Floats, Floats]:
    """(point, prices of the limits) of the linear program; some point and no prices where HiGHS has none."""
    from scipy.optimize import linprog

    rows = ConstraintRows.of(arrays)
    scores, scale, _ = rescaled(arrays)
    equal, right, below = rows.matrices()
    costs = np.concatenate([scores, np.zeros(rows.size - len(scores))])
    result = linprog(costs, below, rows.most, equal, right, bounds=(0, 1), method="highs")
    if result.status != 0:
        _, first = arrays.best(arrays.damage)
        return np.isin(np.arange(len(scores)), first).astype(np.float64), np.zeros(len(rows.most))
    return result.x[: len(scores)], np.maximum(-result.ineqlin.marginals, 0.0) / scale


def _quadratic_optimum(curved: Floats, linear: Floats, arrays: ProblemArrays) -> tuple[Floats, Floats]:
    """(point, prices of the limits) near the optimum; limits that hold whatever is chosen have no price."""
    rows, options = ConstraintRows.of(arrays), len(linear)
    equal, right, below = rows.matrices()
    binding = np.maximum.reduceat(arrays.costs, arrays.offsets[:-1]).sum(axis=0) > arrays.limits
    whole = np.zeros((rows.size, rows.size))
    whole[:options, :options] = curved
    costs = np.concatenate([linear, np.zeros(rows.size - options)])
    start = np.full(rows.size, 0.5)
    start[:options] = 1.0 / np.diff(arrays.offsets)[arrays.choice]
    most, price = arrays.limits.astype(np.float64), np.zeros(len(binding))
    program = QuadraticProgram(whole, costs, equal.toarray(), right, below[binding], most[binding])
    point, price[binding] = program.optimum(start)
    shares = point[:options] / np.add.reduceat(point[:options], arrays.offsets[:-1])[arrays.choice]
    return shares, price


def _convexified(pairs: Floats, arrays: ProblemArrays) -> tuple[Floats, Floats]:
    """(P, q) with x'Px / 2 + q'x equal to the objective at every assignment, and P convex along changes of choices."""
    diagonal = np.diag(pairs)
    share = _movable_share(pairs, diagonal, arrays)
    return pairs - share * np.diag(diagonal), 0.5 * share * diagonal


def _movable_share(pairs: Floats, diagonal: Floats, arrays: ProblemArrays) -> float:
    """The largest s for which pairs - s diag(pairs) stays positive semi-definite along changes inside the choices.

    Changes lead away from the least damaging option of each choice and are divided by their own damage: the
    eigenproblem is well conditioned however many orders of magnitude the damages span."""
    from scipy.linalg import eigh

    weight = diagonal + _TINY * max(float(diagonal.max(initial=0.0)), 1e-300)
    _, home = arrays.lowest(weight)
    others = np.setdiff1d(np.arange(len(diagonal)), home)
    if len(diagonal) > _LARGEST_EIGENPROBLEM or not len(others):
        return 0.0
    changes = np.zeros((len(diagonal), len(others)))
    size = 1.0 / np.sqrt(weight[others])
    changes[others, np.arange(len(others))] = size
    changes[home[arrays.choice[others]], np.arange(len(others))] = -size
    below, above = changes.T @ pairs @ changes, changes.T @ (weight[:, None] * changes)
    smallest = float(eigh(below, above, eigvals_only=True, subset_by_index=[0, 0])[0])
    return smallest - _SAFETY
