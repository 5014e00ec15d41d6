"""Best-improvement swaps on the Gram prediction: one change, or one up and one down, from several starts, with kicks.

A search by exchanges as EvoPress makes them (arXiv 2410.14649), on the predicted damage: a step costs no measurement,
and the prediction of every change follows from the row sums of the matrix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from quantkit.allocation.arrays import Arrays
from quantkit.allocation.highs import highs
from quantkit.allocation.problem import Assignment, Floats, Found, Integers, Problem
from quantkit.allocation.pulp_cbc import pulp_cbc
from quantkit.allocation.registry import Settings, SolverGaveUp, solver
from quantkit.allocation.relaxation import relax

KICKS = 150
_PAIRED_OPTIONS = 400
_TOLERANCE = 1e-12


@solver("swaps", pairs=True)
def swaps(problem: Problem, settings: Settings) -> Found:
    """Swap from the integer program's answer, the relaxation's and random ones; lower bound from the convex
    relaxation."""
    search = Search(problem)
    relaxation = relax(problem, search.arrays)
    starts = [search.arrays.offsets[:-1] + np.array(integer_program(replace(problem, pairs=None), settings))]
    best = search.improve(
        [*starts, search.arrays.heaviest(relaxation.point)], np.random.default_rng(settings.seed), KICKS
    )
    return Found(search.arrays.assignment(best), relaxation.bound)


def integer_program(problem: Problem, settings: Settings) -> Assignment:
    """The optimum of the damages alone; HiGHS takes over where CBC gives up."""
    try:
        return pulp_cbc(problem, settings).assignment
    except SolverGaveUp:
        return highs(problem, settings).assignment


class Search:
    """A walk over assignments: the chosen positions, the row sums of the matrix over them, what they cost."""

    def __init__(self, problem: Problem) -> None:
        self.arrays = Arrays.of(problem)
        pairs = np.diag(2 * self.arrays.damage) if problem.pairs is None else problem.pairs
        self.pairs: Floats = np.ascontiguousarray(pairs)
        self.diagonal: Floats = np.diag(self.pairs).copy()
        self.tolerance = _TOLERANCE * float(np.abs(self.diagonal).max(initial=0.0))
        self.place(np.array(problem.offsets[:-1], dtype=np.int64))

    def place(self, positions: Integers) -> None:
        """Stand at an assignment."""
        self.positions = positions.copy()
        self.sums: Floats = self.pairs[positions].sum(axis=0)
        self.used: Integers = self.arrays.costs[positions].sum(axis=0)

    @property
    def value(self) -> float:
        return 0.5 * float(self.sums[self.positions].sum())

    @property
    def inside(self) -> bool:
        return bool((self.used <= self.arrays.limits).all())

    def take(self, options: Iterable[int]) -> None:
        """Switch the choices of these options to them."""
        for option in options:
            choice = self.arrays.choice[option]
            self.sums += self.pairs[option] - self.pairs[self.positions[choice]]
            self.used = self.used + self.arrays.costs[option] - self.arrays.costs[self.positions[choice]]
            self.positions[choice] = option

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
        if alone[best := int(alone.argmin())] < -self.tolerance:
            self.take([best])
            return True
        some = self._promising(delta, extra)
        both = delta[some][:, None] + delta[some][None, :] + self._cross(some, now[some])
        both[self.arrays.choice[some][:, None] == self.arrays.choice[some][None, :]] = np.inf
        for k, room in enumerate(slack):
            both[extra[some, k][:, None] + extra[some, k][None, :] > room] = np.inf
        if both.size and both.flat[best := int(both.argmin())] < -self.tolerance:
            self.take([int(some[best // len(some)]), int(some[best % len(some)])])
            return True
        return False

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
            delta, extra, _ = self.changes()
            removed = self.overuse(self.used) - self.overuse(self.used + extra)
            price = np.where(
                (removed > 0) & np.isfinite(delta), np.maximum(delta, 0.0) / np.maximum(removed, 1e-300), np.inf
            )
            if not np.isfinite(price[best := int(price.argmin())]):
                return False
            self.take([best])
        return True

    def descend(self) -> None:
        while self.step():
            pass

    def retagged(self) -> Iterator[Integers]:
        """Assignments in which one group has another tag, its members the options nearest in damage."""
        arrays = self.arrays
        of_choice = arrays.component_of[arrays.offsets[:-1]]
        for state in np.flatnonzero(np.bincount(arrays.component)[arrays.component] > 1):
            held = arrays.state_of[self.positions]
            if (held == state).any():
                continue
            changed = self.positions.copy()
            for choice in np.flatnonzero(of_choice == arrays.component[state]):
                options = np.flatnonzero((arrays.choice == choice) & (arrays.state_of == state))
                distance = np.abs(arrays.damage[options] - arrays.damage[self.positions[choice]])
                changed[choice] = options[int(distance.argmin())]
            yield changed

    def _better_tag(self) -> bool:
        value, home = self.value, self.positions.copy()
        for positions in self.retagged():
            self.place(positions)
            if self.repair():
                self.descend()
                if self.value < value - self.tolerance:
                    return True
            self.place(home)
        return False

    def _kick(self, generator: np.random.Generator) -> None:
        """Give a few random choices random options of the tags they have, and sometimes a group another tag."""
        retagged = list(self.retagged())
        if retagged and generator.random() < 0.3:
            self.place(retagged[int(generator.integers(len(retagged)))])
        count = len(self.positions)
        for choice in generator.permutation(count)[: int(generator.integers(2, max(4, count // 6) + 1))]:
            options = np.flatnonzero(
                (self.arrays.choice == choice) & (self.arrays.state_of == self.arrays.state_of[self.positions[choice]])
            )
            self.take([int(options[int(generator.integers(len(options)))])])

    def improve(self, starts: Iterable[Integers], generator: np.random.Generator, kicks: int) -> Integers:
        """The best positions found from the starts (the first of them feasible), then after ``kicks`` random kicks."""
        best, lowest = self.positions, np.inf
        for start in starts:
            self.place(start)
            if not self.repair():
                continue
            self.descend()
            while self._better_tag():
                pass
            if self.value < lowest:
                best, lowest = self.positions.copy(), self.value
        for _ in range(kicks):
            self.place(best)
            self._kick(generator)
            if not self.repair():
                continue
            self.descend()
            if self.value < lowest - self.tolerance:
                best, lowest = self.positions.copy(), self.value
        return best
