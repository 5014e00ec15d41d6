"""A convex quadratic program with equalities and a few limits, by a primal-dual interior-point method.

Mehrotra's predictor and corrector (SIAM J. Optimization 2, 1992) with one dense linear system per iteration: damages
span many orders of magnitude, which first-order methods do not survive. Limited iterations, no tolerance to tune: what
is asked of the result is a point near the optimum and multipliers of the limits, and any such pair gives a valid bound
(see ``relaxation``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from quantkit.allocation.problem import Floats

_ITERATIONS = 40
_DONE = 1e-12
_TO_THE_BOUNDARY = 0.99


@dataclass(eq=False)
class _Iterate:
    """Point and multipliers: of ``point`` >= 0, of the equalities (free), slack and multiplier of the limits."""

    point: Floats
    reduced: Floats
    free: Floats
    slack: Floats
    price: Floats

    def complementarity(self) -> float:
        return float(self.point @ self.reduced + self.slack @ self.price) / (len(self.point) + len(self.slack))

    def finite(self) -> bool:
        return all(bool(np.isfinite(part).all()) for part in vars(self).values())

    def longest_step(self, move: _Iterate) -> float:
        """The largest step of at most 1 that keeps everything positive, short of the boundary."""
        now = np.concatenate([self.point, self.reduced, self.slack, self.price])
        change = np.concatenate([move.point, move.reduced, move.slack, move.price])
        down = change < 0
        return min(1.0, _TO_THE_BOUNDARY * float((now[down] / -change[down]).min(initial=np.inf)))

    def moved(self, move: _Iterate, step: float) -> _Iterate:
        return _Iterate(**{name: part + step * getattr(move, name) for name, part in vars(self).items()})


@dataclass(frozen=True, eq=False)
class QuadraticProgram:
    """Minimize x'Px/2 + q'x over x >= 0 with Ax = a and Bx <= b: P ``curved``, q ``linear``, A ``equal``, a ``right``,
    B ``below``, b ``most``. P must be convex along the directions that Ax = a leaves.
    """

    curved: Floats
    linear: Floats
    equal: Floats
    right: Floats
    below: Floats
    most: Floats

    def optimum(self, start: Floats) -> tuple[Floats, Floats]:
        """(point, multipliers of the limits) near the minimum, from a positive ``start``. Stops where rounding makes
        the linear system singular.
        """
        norms = np.maximum(np.linalg.norm(self.below, axis=1), 1e-300)
        size = max(float(np.abs(self.linear).max(initial=0.0)), float(np.abs(self.curved).max(initial=0.0)), 1e-300)
        scaled = replace(
            self,
            curved=self.curved / size,
            linear=self.linear / size,
            below=self.below / norms[:, None],
            most=self.most / norms,
        )
        point, price = scaled._solve(start)
        return np.maximum(point, 0.0), np.maximum(price, 0.0) * size / norms

    def _solve(self, start: Floats) -> tuple[Floats, Floats]:
        now = self._first(start)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # what overflows is not gone to
            for _ in range(_ITERATIONS):
                following = self._following(now)
                if following is None or not following.finite():
                    break
                now = following
        return now.point, now.price

    def _following(self, now: _Iterate) -> _Iterate | None:
        """The next iterate; None at the optimum, and where the linear system is singular."""
        gap = now.complementarity()
        if gap < _DONE:
            return None
        try:
            direction = self._directions(now)
            affine = direction(0.0, None)
            ahead = now.moved(affine, now.longest_step(affine)).complementarity()
            move = direction(gap * (ahead / gap) ** 3, affine)
        except np.linalg.LinAlgError:
            return None
        return now.moved(move, now.longest_step(move))

    def _first(self, start: Floats) -> _Iterate:
        weight = max(1e-6, float(np.abs(self.linear).mean()))
        slack = np.maximum(self.most - self.below @ start, 0.1 * np.abs(self.most) + 1e-9)
        reduced, price = np.full(len(start), weight), np.full(len(slack), weight)
        return _Iterate(start, reduced, np.zeros(len(self.right)), slack, price)

    def _directions(self, now: _Iterate) -> Callable[[float, _Iterate | None], _Iterate]:
        """Newton directions towards a complementarity, corrected by the products of an earlier direction; both from
        one factorization. Raises LinAlgError where the system is singular."""
        from scipy.linalg.lapack import dgetrf, dgetrs

        count, rows = len(now.point), len(self.right)
        limits = len(self.most)
        system = np.zeros((count + rows + limits,) * 2)
        system[:count, :count] = self.curved + np.diag(now.reduced / now.point)
        system[:count, count : count + rows] = -self.equal.T
        system[count : count + rows, :count] = self.equal
        system[:count, count + rows :] = self.below.T
        system[count + rows :, :count] = self.below
        system[count + rows :, count + rows :] = -np.diag(now.slack / now.price)
        factors, pivots, failure = dgetrf(system)
        if failure:
            raise np.linalg.LinAlgError("Singular matrix")
        stationary = self.curved @ now.point + self.linear - self.equal.T @ now.free - now.reduced
        stationary = stationary + self.below.T @ now.price
        missing, over = self.equal @ now.point - self.right, self.below @ now.point + now.slack - self.most

        def direction(target: float, earlier: _Iterate | None) -> _Iterate:
            at_point = target - (0.0 if earlier is None else earlier.point * earlier.reduced)
            at_slack = target - (0.0 if earlier is None else earlier.slack * earlier.price)
            curved = at_point / now.point - now.reduced - stationary
            right = np.concatenate([curved, -missing, now.slack - at_slack / now.price - over])
            step = dgetrs(factors, pivots, right)[0]
            point, free, price = step[:count], step[count : count + rows], step[count + rows :]
            reduced = (at_point - now.reduced * point) / now.point - now.reduced
            slack = (at_slack - now.slack * price) / now.price - now.slack
            return _Iterate(point, reduced, free, slack, price)

        return direction
