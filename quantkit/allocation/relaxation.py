"""Lower bounds: the linear relaxation of a separable problem, the convex relaxation of a quadratic one.

The quadratic form is convex (``pairs`` is positive semi-definite), so its tangent at any point lies below it: the
least value of a tangent over all assignments bounds the objective, wherever the point lies; the closer to the relaxed
optimum, the tighter. Two identities of one-hot vectors raise the bound first. x*x = x moves a share of the diagonal
into the linear part, and only changes inside the choices matter, so the form need be convex along those alone
(quadratic convex reformulation, Billionnet and Elloumi, Math. Programming 109, 2007, with one common factor instead of
a semi-definite program)."""

from __future__ import annotations

import math

import numpy as np

from quantkit.allocation.arrays import Arrays
from quantkit.allocation.highs import minimize, run
from quantkit.allocation.problem import Assignment, Floats, Problem
from quantkit.allocation.registry import NoAssignment, Settings, SolverGaveUp
from quantkit.allocation.rows import Rows, rescaled

_ITERATIONS = 600
_LARGEST_EIGENPROBLEM = 1200
_SAFETY = 1e-9


def lower_bound(problem: Problem) -> float:
    """A lower bound of ``objective`` over all feasible assignments of a reduced problem; -inf where none was found."""
    if problem.pairs is not None:
        return quadratic_bound(problem)[0]
    arrays = Arrays.of(problem)
    rows = Rows.of(arrays)
    scaled, scale, shift = rescaled(arrays.damage, arrays)
    result = run(rows, scaled, rows.most, Settings(), integral=False)
    return -math.inf if result.x is None else float(result.fun) / scale + shift


def quadratic_bound(problem: Problem) -> tuple[float, Assignment | None]:
    """(lower bound, the assignment that minimizes the tangent): the latter is a good place to start a search from."""
    assert problem.pairs is not None
    arrays = Arrays.of(problem)
    curved, linear = _convexified(problem.pairs, arrays)
    point = _relaxed_optimum(curved, linear, Rows.of(arrays), arrays)
    slope = curved @ point + linear
    value = 0.5 * float(point @ curved @ point) + float(linear @ point)
    try:
        found = minimize(arrays, slope, Settings(gap=1e-4, nodes=2000))
    except (NoAssignment, SolverGaveUp):
        return -math.inf, None
    tangent = value - float(slope @ point) + found.bound
    return tangent - _SAFETY * (abs(value) + abs(float(slope @ point))), found.assignment


def _convexified(pairs: Floats, arrays: Arrays) -> tuple[Floats, Floats]:
    """(P, q) with x'Px / 2 + q'x equal to the objective at every assignment, and P convex along changes of choices."""
    diagonal = np.diag(pairs)
    share = _movable_share(pairs, diagonal, arrays)
    return pairs - share * np.diag(diagonal), 0.5 * share * diagonal


def _movable_share(pairs: Floats, diagonal: Floats, arrays: Arrays) -> float:
    """The largest s for which pairs - s diag(pairs) stays positive semi-definite along changes inside the choices."""
    from scipy.linalg import eigh

    count, choices = len(diagonal), len(arrays.offsets) - 1
    if count > _LARGEST_EIGENPROBLEM or count == choices:
        return 0.0
    first = arrays.offsets[:-1]
    others = np.setdiff1d(np.arange(count), first)
    changes = np.zeros((count, len(others)))
    changes[others, np.arange(len(others))] = 1.0
    changes[first[arrays.choice[others]], np.arange(len(others))] = -1.0
    weight = diagonal + 1e-12 * max(float(diagonal.max(initial=0.0)), 1e-300)
    below, above = changes.T @ pairs @ changes, changes.T @ (weight[:, None] * changes)
    smallest = float(eigh(below, above, eigvals_only=True, subset_by_index=[0, 0])[0])
    return max(0.0, smallest - 1e-9)


def _relaxed_optimum(curved: Floats, linear: Floats, rows: Rows, arrays: Arrays) -> Floats:
    """A point near the optimum of the relaxation (ADMM, Boyd et al. 2011), its options of each choice adding up to
    1."""
    count = len(linear)
    below = (
        rows.below / np.maximum(np.linalg.norm(rows.below, axis=1, keepdims=True), 1.0)
        if len(rows.below)
        else np.zeros((0, count))
    )
    most = rows.most / np.maximum(np.linalg.norm(rows.below, axis=1), 1.0) if len(rows.below) else np.zeros(0)
    one_hot = np.zeros((len(arrays.offsets) - 1, count))
    one_hot[arrays.choice, np.arange(count)] = 1.0
    matrix = np.vstack([one_hot, below, np.eye(count)])
    lower = np.concatenate([np.ones(len(one_hot)), np.full(len(most), -np.inf), np.zeros(count)])
    upper = np.concatenate([np.ones(len(one_hot)), most, np.ones(count)])
    size = max(float(np.median(np.diag(curved) + np.abs(linear))), 1e-300)
    system = np.linalg.inv(curved / size + matrix.T @ matrix)
    point, dual, image = np.zeros(count), np.zeros(len(matrix)), np.zeros(len(matrix))
    for _ in range(_ITERATIONS):
        point = system @ (matrix.T @ (image - dual) - linear / size)
        moved = matrix @ point
        image = np.clip(moved + dual, lower, upper)
        dual += moved - image
    point = np.maximum(point, 1e-9)
    return point / np.add.reduceat(point, arrays.offsets[:-1])[arrays.choice]
