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

from quantkit.allocation.arrays import Arrays
from quantkit.allocation.interior import relaxed_optimum
from quantkit.allocation.problem import Floats, Problem

_LARGEST_EIGENPROBLEM = 1200
_SAFETY = 1e-9


@dataclass(frozen=True, eq=False)
class Relaxation:
    """``bound`` of the objective of any feasible assignment; ``forced``: the same for those that take each option;
    ``point``: the weight of each option near the relaxed optimum."""

    bound: float
    forced: Floats
    point: Floats


def relax(problem: Problem, arrays: Arrays) -> Relaxation:
    """The relaxation of a reduced problem, quadratic or separable."""
    count = len(arrays.damage)
    curved, linear = np.zeros((count, count)), arrays.damage
    if problem.pairs is not None:
        curved, linear = _convexified(problem.pairs, arrays)
    most = arrays.limits.astype(np.float64)
    point, price = relaxed_optimum(curved, linear, arrays.choice, arrays.costs.T.astype(np.float64), most)
    slope = curved @ point + linear
    value = 0.5 * float(point @ curved @ point) + float(linear @ point)
    score = slope + arrays.costs @ price
    constant = value - float(slope @ point) - float(price @ most)
    total, forced = arrays.forced(score)
    safety = _SAFETY * (abs(value) + abs(float(slope @ point)) + float(price @ most))
    return Relaxation(total + constant - safety, forced + constant - safety, point)


def _convexified(pairs: Floats, arrays: Arrays) -> tuple[Floats, Floats]:
    """(P, q) with x'Px / 2 + q'x equal to the objective at every assignment, and P convex along changes of choices."""
    diagonal = np.diag(pairs)
    share = _movable_share(pairs, diagonal, arrays)
    return pairs - share * np.diag(diagonal), 0.5 * share * diagonal


def _movable_share(pairs: Floats, diagonal: Floats, arrays: Arrays) -> float:
    """The largest s for which pairs - s diag(pairs) stays positive semi-definite along changes inside the choices."""
    from scipy.linalg import eigh

    count, first = len(diagonal), arrays.offsets[:-1]
    others = np.setdiff1d(np.arange(count), first)
    if count > _LARGEST_EIGENPROBLEM or not len(others):
        return 0.0
    changes = np.zeros((count, len(others)))
    changes[others, np.arange(len(others))] = 1.0
    changes[first[arrays.choice[others]], np.arange(len(others))] = -1.0
    weight = diagonal + 1e-12 * max(float(diagonal.max(initial=0.0)), 1e-300)
    below, above = changes.T @ pairs @ changes, changes.T @ (weight[:, None] * changes)
    smallest = float(eigh(below, above, eigvals_only=True, subset_by_index=[0, 0])[0])
    return max(0.0, smallest - 1e-9)
