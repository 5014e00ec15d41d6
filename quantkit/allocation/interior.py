"""A convex quadratic program over one-hot choices and a few limits, by a primal-dual interior-point method.

Mehrotra's predictor and corrector (SIAM J. Optimization 2, 1992) with one dense linear system per iteration: damages
span many orders of magnitude, which first-order methods do not survive. Limited iterations, no tolerance to tune: what
is asked of the result is a point near the optimum and multipliers of the limits, and any such pair gives a valid bound
(see ``relaxation``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from quantkit.allocation.problem import Floats, Integers

_ITERATIONS = 40
_DONE = 1e-12
_TO_THE_BOUNDARY = 0.99


@dataclass(eq=False)
class _Iterate:
    """Point and multipliers: of ``point`` >= 0, of the one-hot rows (free), slack and multiplier of the limits."""

    point: Floats
    reduced: Floats
    free: Floats
    slack: Floats
    price: Floats

    def complementarity(self) -> float:
        return float(self.point @ self.reduced + self.slack @ self.price) / (len(self.point) + len(self.slack))

    def longest_step(self, move: _Iterate) -> float:
        """The largest step of at most 1 that keeps everything positive, short of the boundary."""
        now = np.concatenate([self.point, self.reduced, self.slack, self.price])
        change = np.concatenate([move.point, move.reduced, move.slack, move.price])
        down = change < 0
        return min(1.0, _TO_THE_BOUNDARY * float((now[down] / -change[down]).min(initial=np.inf)))

    def moved(self, move: _Iterate, step: float) -> _Iterate:
        return _Iterate(
            self.point + step * move.point,
            self.reduced + step * move.reduced,
            self.free + step * move.free,
            self.slack + step * move.slack,
            self.price + step * move.price,
        )


def relaxed_optimum(
    curved: Floats, linear: Floats, choice: Integers, below: Floats, most: Floats
) -> tuple[Floats, Floats]:
    """(point, multipliers of the limits) near the minimum of x'Px/2 + q'x, x >= 0 adding up to 1 in every choice, Bx
    <= b.

    ``choice``: the choice of every variable. P must be convex along changes inside the choices.
    """
    count, choices = len(linear), int(choice.max(initial=-1)) + 1
    one_hot = np.zeros((choices, count))
    one_hot[choice, np.arange(count)] = 1.0
    norms = np.maximum(np.linalg.norm(below, axis=1), 1e-300)
    size = max(float(np.abs(linear).max(initial=0.0)), float(np.abs(curved).max(initial=0.0)), 1e-300)
    program = _Program(curved / size, linear / size, one_hot, below / norms[:, None], most / norms)
    point, price = program.solve()
    point = np.maximum(point, 0.0)
    return point / (one_hot @ point)[choice], np.maximum(price, 0.0) * size / norms


@dataclass(frozen=True, eq=False)
class _Program:
    curved: Floats
    linear: Floats
    one_hot: Floats
    below: Floats
    most: Floats

    def solve(self) -> tuple[Floats, Floats]:
        now = self._start()
        for _ in range(_ITERATIONS):
            gap = now.complementarity()
            if gap < _DONE:
                break
            direction = self._directions(now)
            affine = direction(0.0, None)
            ahead = now.moved(affine, now.longest_step(affine)).complementarity()
            move = direction(gap * (ahead / gap) ** 3, affine)
            now = now.moved(move, now.longest_step(move))
        return now.point, now.price

    def _start(self) -> _Iterate:
        point = (1.0 / self.one_hot.sum(axis=1)) @ self.one_hot
        weight = max(1e-6, float(np.abs(self.linear).mean()))
        slack = np.maximum(self.most - self.below @ point, 0.1 * np.abs(self.most) + 1e-9)
        return _Iterate(
            point,
            np.full(len(point), weight),
            np.zeros(len(self.one_hot)),
            slack,
            np.full(len(slack), weight),
        )

    def _directions(self, now: _Iterate) -> Callable[[float, _Iterate | None], _Iterate]:
        """Newton directions towards a complementarity, corrected by the products of an earlier direction."""
        count, choices = len(now.point), len(self.one_hot)
        limits = len(self.most)
        system = np.zeros((count + choices + limits,) * 2)
        system[:count, :count] = self.curved + np.diag(now.reduced / now.point)
        system[:count, count : count + choices] = -self.one_hot.T
        system[count : count + choices, :count] = self.one_hot
        system[:count, count + choices :] = self.below.T
        system[count + choices :, :count] = self.below
        system[count + choices :, count + choices :] = -np.diag(now.slack / now.price)
        stationary = self.curved @ now.point + self.linear - self.one_hot.T @ now.free - now.reduced
        stationary = stationary + self.below.T @ now.price
        missing, over = self.one_hot @ now.point - 1.0, self.below @ now.point + now.slack - self.most

        def direction(target: float, earlier: _Iterate | None) -> _Iterate:
            at_point = target - (0.0 if earlier is None else earlier.point * earlier.reduced)
            at_slack = target - (0.0 if earlier is None else earlier.slack * earlier.price)
            right = np.concatenate(
                [
                    at_point / now.point - now.reduced - stationary,
                    -missing,
                    now.slack - at_slack / now.price - over,
                ]
            )
            step = np.linalg.solve(system, right)
            point, free, price = step[:count], step[count : count + choices], step[count + choices :]
            reduced = (at_point - now.reduced * point) / now.point - now.reduced
            slack = (at_slack - now.slack * price) / now.price - now.slack
            return _Iterate(point, reduced, free, slack, price)

        return direction
