"""Local search over assignments: what every change would gain, descent, repair, kicks.

A search by exchanges as EvoPress makes them (arXiv 2410.14649), on the predicted damage: a step costs no measurement,
and the prediction of every change follows from the row sums of the matrix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from quantkit.allocation.problem import Floats, Integers, Problem
from quantkit.allocation.problem_arrays import ProblemArrays

_PAIRED_OPTIONS = 400
_TOLERANCE = 1e-12


class LocalSearch:
    """The present assignment: the chosen positions, the row sums of the matrix over them, what they cost.

    All three follow from the positions alone, so that no rounding error is carried along."""

    def __init__(self, problem: Problem) -> None:
        self.arrays = ProblemArrays.of(problem)
        pairs = np.diag(2 * self.arrays.damage) if problem.pairs is None else problem.pairs
        self.pairs: Floats = np.ascontiguousarray(pairs)
        self.diagonal: Floats = np.diag(self.pairs).copy()
        self.place(np.array(problem.offsets[:-1], dtype=np.int64))

    def place(self, positions: Integers) -> None:
        """Move to an assignment."""
        self.positions = positions
        self.sums: Floats = self.pairs[positions].sum(axis=0)
        self.used: Integers = self.arrays.costs[positions].sum(axis=0)

    @property
    def value(self) -> float:
        return 0.5 * float(self.sums[self.positions].sum())

    @property
    def inside(self) -> bool:
        return self.arrays.within(self.positions)

    def with_options(self, options: Sequence[int] | Integers) -> Integers:
        """The positions with the choices of these options switched to them."""
        changed = self.positions.copy()
        changed[self.arrays.choice[options]] = options
        return changed

    def lower(self, options: Sequence[int]) -> bool:
        """Switch to these options if that lowers the objective, rounding errors aside."""
        home, value = self.positions, self.value
        self.place(self.with_options(options))
        if self.value < value - _TOLERANCE * abs(value):
            return True
        self.place(home)
        return False

    def changes(self) -> tuple[Floats, Integers, Integers]:
        """Of every option: the change of the objective and of the costs if its choice switched to it, and what it
        replaces.

        Infinite where the choice has it already, or where its tag is not the one its group has.
        """
        now = self.positions[self.arrays.choice]
        delta = (
            self.sums
            - self.sums[now]
            + 0.5 * (self.diagonal + self.diagonal[now])
            - self.pairs[np.arange(len(now)), now]
        )
        delta[self.arrays.state_of != self.arrays.state_of[now]] = np.inf
        delta[self.positions] = np.inf
        return delta, self.arrays.costs - self.arrays.costs[now], now

    def step(self) -> bool:
        """Take the best single change that lowers the objective, else the best pair; False when none does."""
        delta, extra, now = self.changes()
        slack = self.arrays.limits - self.used
        alone = np.where((extra <= slack).all(axis=1), delta, np.inf)
        if alone[best := int(alone.argmin())] < 0.0 and self.lower([best]):
            return True
        some = self._promising(delta, extra)
        both = self._exchanges(some, delta, extra, now, slack)
        if not both.size or both.flat[best := int(both.argmin())] >= 0.0:
            return False
        return self.lower([int(some[best // len(some)]), int(some[best % len(some)])])

    def best_moves(self, count: int) -> list[list[int]]:
        """The ``count`` changes of one or two options within the limits with the least predicted objective."""
        delta, extra, now = self.changes()
        slack = self.arrays.limits - self.used
        some = self._promising(delta, extra)
        both = np.full((len(some), len(some) + 1), np.inf)
        both[:, 1:] = self._exchanges(some, delta, extra, now, slack)
        both[:, 1:][np.tril_indices(len(some))] = np.inf
        both[:, 0] = np.where((extra[some] <= slack).all(axis=1), delta[some], np.inf)
        order = np.argsort(both, axis=None, kind="stable")[:count]
        pairs = [divmod(int(k), len(some) + 1) for k in order if np.isfinite(both.flat[k])]
        return [[int(some[i])] + ([int(some[j - 1])] if j else []) for i, j in pairs]

    def _exchanges(self, some: Integers, delta: Floats, extra: Integers, now: Integers, slack: Integers) -> Floats:
        """The change of the objective when two options are switched, infinite where the limits or a choice forbid."""
        both: Floats = delta[some][:, None] + delta[some][None, :] + self._cross(some, now[some])
        both[self.arrays.choice[some][:, None] == self.arrays.choice[some][None, :]] = np.inf
        for k, room in enumerate(slack):
            both[extra[some, k][:, None] + extra[some, k][None, :] > room] = np.inf
        return both

    def _cross(self, some: Integers, now: Integers) -> Floats:
        """Pair terms between two changes: (new - old) times (new - old)."""
        cross: Floats = self.pairs[np.ix_(some, some)] + self.pairs[np.ix_(now, now)]
        mixed = self.pairs[np.ix_(some, now)]
        return cross - mixed - mixed.T

    def _promising(self, delta: Floats, extra: Integers) -> Integers:
        """The options worth pairing: all of them, or of very many those that gain most and those that save most
        cheaply."""
        possible = np.flatnonzero(np.isfinite(delta))
        if len(possible) <= 2 * _PAIRED_OPTIONS:
            return possible
        saved = (-extra[possible] / np.maximum(self.arrays.limits, 1)).sum(axis=1)
        gain = np.argsort(delta[possible], kind="stable")[:_PAIRED_OPTIONS]
        price = np.where(saved > 0, delta[possible] / np.maximum(saved, 1e-300), np.inf)
        return np.union1d(possible[gain], possible[np.argsort(price, kind="stable")[:_PAIRED_OPTIONS]])

    def overuse(self, used: Integers) -> Floats:
        """By how much limits are broken, each relative to itself, added up (over the last axis)."""
        return np.asarray((np.maximum(used - self.arrays.limits, 0) / np.maximum(self.arrays.limits, 1)).sum(axis=-1))

    def repair(self) -> bool:
        """Change options, least damage per overuse removed first, until the limits hold; False when stuck."""
        while not self.inside:
            relief = self._cheapest_relief()
            if relief is None:
                return False
            self.place(relief)
        return True

    def _cheapest_relief(self) -> Integers | None:
        """The assignment with one option, or the tag of one group, changed at the least damage per overuse removed;
        None when no change removes any."""
        delta, extra, _ = self.changes()
        removed = self.overuse(self.used) - self.overuse(self.used + extra)
        price = np.full(len(delta), np.inf)
        useful = (removed > 0) & np.isfinite(delta)
        price[useful] = np.maximum(delta[useful], 0.0) / removed[useful]
        best = int(price.argmin())
        cheapest, relief = price[best], self.with_options([best])
        home, value, overuse = self.positions, self.value, float(self.overuse(self.used))
        for positions in [*self.retagged(self.arrays.relative_cost), *self.retagged()]:
            self.place(positions)
            gained = overuse - float(self.overuse(self.used))
            if gained > 0 and (at := max(self.value - value, 0.0) / gained) < cheapest:
                cheapest, relief = at, positions
        self.place(home)
        return relief if cheapest < np.inf else None

    def descend(self) -> None:
        while self.step():
            pass

    def retagged(self, score: Floats | None = None) -> Iterator[Integers]:
        """The assignment with another tag for one group: of its members the options of least score, or those nearest
        in damage to what they have."""
        arrays, home = self.arrays, self.positions
        if score is None:
            score = np.abs(arrays.damage - arrays.damage[home[arrays.choice]])
        _, first = arrays.cell_minimum(score)
        for state in np.flatnonzero(np.bincount(arrays.component)[arrays.component] > 1):
            if (arrays.state_of[home] != state).all():
                changed = home.copy()
                members = first[arrays.state == state]
                changed[arrays.choice[members]] = members
                yield changed

    def _better_tag(self) -> bool:
        home, value = self.positions, self.value
        for positions in [*self.retagged(), *self.retagged(self.arrays.relative_cost)]:
            self.place(positions)
            if self.repair():
                self.descend()
                if self.value < value - _TOLERANCE * abs(value):
                    return True
        self.place(home)
        return False

    def _kick(self, generator: np.random.Generator) -> None:
        """Give a few random choices random options of the tags they have, and sometimes a group another tag."""
        retagged = list(self.retagged())
        if retagged and generator.random() < 0.3:
            self.place(retagged[int(generator.integers(len(retagged)))])
        count = len(self.positions)
        options = []
        for choice in generator.permutation(count)[: int(generator.integers(2, max(4, count // 6) + 1))]:
            alike = self.arrays.state_of == self.arrays.state_of[self.positions[choice]]
            same = np.flatnonzero((self.arrays.choice == choice) & alike)
            options.append(int(same[int(generator.integers(len(same)))]))
        self.place(self.with_options(options))

    def improve(self, starts: Iterable[Integers], generator: np.random.Generator, kicks: int) -> Integers:
        """The best positions reached from the starts (the first feasible), then after ``kicks`` random kicks."""
        best, lowest = None, np.inf
        for start in starts:
            self.place(start)
            if not self.repair():
                continue
            self.descend()
            while self._better_tag():
                pass
            if best is None or self.value < lowest:
                best, lowest = self.positions, self.value
        assert best is not None, "the first start meets the limits"
        for _ in range(kicks):
            self.place(best)
            self._kick(generator)
            if not self.repair():
                continue
            self.descend()
            if self.value < lowest - _TOLERANCE * abs(lowest):
                best, lowest = self.positions, self.value
        return best
