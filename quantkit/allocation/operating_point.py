"""Improvement of a plan by what is measured around it, not around the float model.

Below four bits the second order at the float point mispredicts (docs/methods/operating-point.md). Rounds: measure
every single change of the plan, solve again within a trust region, accept only what lowers the measured damage. Then
exchanges (one format up, one down) chosen by measured damage alone, many on a part of the inputs and the best of them
on all, as EvoPress selects (arXiv 2410.14649). A few hundred inputs differ by more than plans do, and the best of many
plans looks better than it is: better is what is better by two standard errors of the difference, input by input, and
what no other measure finds worse; where one draw of the inputs leaves that open, more draws are measured. What is
measured comes through ``Measurements``; nothing here depends on a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from quantkit.allocation.from_profile import AllocationProblem, option_entries, with_nothing
from quantkit.allocation.local_search import LocalSearch
from quantkit.allocation.presolve import Presolved, presolve
from quantkit.allocation.problem import Assignment, Choice, Floats, Integers, Problem
from quantkit.plan import Profile

KICKS = 60
CANDIDATES = 16  # exchanges tried on a part of the inputs, and the part
PART = 0.25
FINALISTS = 4
SURE = 2.0  # standard errors by which a plan must be better


class Measurements(Protocol):
    """What may be measured. ``entries`` are positions in the profile's entries: the formats of a plan. ``draws``: how
    many draws of the inputs there are.
    """

    @property
    def draws(self) -> int: ...

    def rows(self, many: Sequence[Sequence[int]], share: float = 1.0, draw: int = 0) -> list[Floats]:
        """Damage of each plan by one or more measures, the first of which decides: (measures, samples), for a share
        of a draw of the inputs (the same ones every time). Costs ``share`` of a measurement each.
        """

    def around(self, entries: Sequence[int]) -> tuple[Floats, Floats]:
        """(damage (K,) of the plan with each entry put in place of its owner's, pair terms (K, K) of the changes, zero
        for entries the plan has). Costs a measurement, and one per entry that is not in the plan.
        """


@dataclass
class Ledger:
    """Measurements spent and left, and a line per step: what was tried, what it cost and what it gained."""

    allowed: float
    spent: float = 0.0
    steps: list[dict[str, Any]] = field(default_factory=list)

    def affords(self, cost: float) -> bool:
        return self.spent + cost <= self.allowed

    def note(self, step: str, damage: float, accepted: bool) -> None:
        """A step that took all that was spent since the last one."""
        taken = self.spent - sum(one["measurements"] for one in self.steps)
        self.steps.append({"step": step, "measurements": taken, "damage": damage, "accepted": accepted})


def improve(
    profile: Profile,
    allocation: AllocationProblem,
    start: Assignment,
    measurements: Measurements,
    allowed: float,
    seed: int = 0,
) -> tuple[Assignment, Ledger]:
    """The best assignment found with at most ``allowed`` measurements; never one that measures worse than
    ``start``.
    """
    walk = _Walk(profile, allocation, start, measurements, Ledger(allowed), np.random.default_rng(seed))
    while walk.look_around():
        moved = walk.jump()
        if not walk.exchange() and not moved:
            break
    return walk.assignment, walk.ledger


@dataclass
class _Walk:
    """Where the walk stands, and what was last measured around it (``local``: a problem whose objective is the change
    of the damage).
    """

    profile: Profile
    allocation: AllocationProblem
    assignment: Assignment
    measurements: Measurements
    ledger: Ledger
    generator: np.random.Generator
    local: Problem | None = None
    rows: list[Floats] = field(default_factory=list)  # of the plan, draw by draw, as far as measured

    @property
    def damage(self) -> float:
        """Measured damage of the plan that the walk stands on."""
        return _decisive(self.rows[0])

    def entries(self, assignment: Assignment) -> list[int]:
        return self.profile.chosen(*self.allocation.decode(assignment))

    def look_around(self) -> bool:
        """Measure the plan and every single change of it; False when that is no longer affordable."""
        chosen = self.entries(self.assignment)
        cost = 1 + len(self.profile.entries) - len(chosen) + (not self.rows)
        if not chosen or not self.ledger.affords(cost):
            return False
        if not self.rows:
            self.rows = self.measurements.rows([chosen])
        damage, pairs = self.measurements.around(chosen)
        terms = pairs.copy()
        np.fill_diagonal(terms, 2 * (damage - damage[chosen[0]]))
        terms[chosen, chosen] = 0.0
        owners = [*self.allocation.layers, *self.allocation.sites]
        rows = option_entries(self.profile, self.allocation.problem.choices, owners)
        self.local = replace(self.allocation.problem, pairs=with_nothing(terms)[np.ix_(rows, rows)])
        self.ledger.spent += cost
        self.ledger.note("look around", self.damage, True)
        return True

    def jump(self) -> bool:
        """Solve again within a trust region, halved until what it proposes measures better."""
        assert self.local is not None
        radius = max(2, len(self.allocation.layers) // 2)
        while radius >= 2 and self.ledger.affords(1):
            proposed = self._solve_within(radius)
            if proposed == self.assignment:
                return False
            (rows,) = self.measurements.rows([self.entries(proposed)])
            self.ledger.spent += 1
            if self._moved(f"jump within {radius} changes", proposed, rows):
                return True
            radius //= 2
        return False

    def _moved(self, step: str, proposed: Assignment, rows: Floats) -> bool:
        """Move to a plan with this damage on the first draw, if it is better than the present one, not by chance. Of
        a plan that might be, both are measured on more draws, sample by sample, as long as that is affordable.
        """
        drawn, gains = [rows], [self.rows[0] - rows]
        while not (sure := _sure(gains)) and self._worth_another(gains):
            draw = len(drawn)
            measured = [proposed] if draw < len(self.rows) else [proposed, self.assignment]
            theirs, *ours = self.measurements.rows([self.entries(one) for one in measured], draw=draw)
            self.ledger.spent += len(measured)
            self.rows += ours
            drawn.append(theirs)
            gains.append(self.rows[draw] - theirs)
        self.ledger.note(step, _decisive(rows), sure)
        if sure:
            self.assignment, self.rows = proposed, drawn
        return sure

    def _worth_another(self, gains: Sequence[Floats]) -> bool:
        promising = _decisive(np.mean(gains, axis=0)) > 0
        return promising and len(gains) < self.measurements.draws and self.ledger.affords(2)

    def _solve_within(self, radius: int) -> Assignment:
        """The least predicted damage with at most ``radius`` choices changed, by swaps from where the walk stands."""
        assert self.local is not None

        def counting(choice: Choice, now: int) -> Choice:
            return choice.with_options(lambda k, option: replace(option, costs=(*option.costs, int(k != now))))

        choices = tuple(map(counting, self.local.choices, self.assignment))
        limited = replace(self.local, choices=choices, limits=(*self.local.limits, ("changes", radius)))
        reduced = presolve(limited)
        search = LocalSearch(reduced.problem)
        positions = search.improve([_positions(reduced, self.assignment)], self.generator, KICKS)
        return reduced.expand(search.arrays.assignment(positions))

    def exchange(self) -> bool:
        """The best of the most promising exchanges, measured on a part of the inputs first; whether one was taken."""
        taken = False
        cost = CANDIDATES * PART + PART + FINALISTS
        while self.ledger.affords(cost):
            tried = list(self._promising(CANDIDATES))
            if not tried:
                break
            part, *rough = self._means([self.assignment, *tried], PART)
            finalists = [k for k in np.argsort(rough, kind="stable")[:FINALISTS] if rough[k] < part]
            measured = self.measurements.rows([self.entries(tried[k]) for k in finalists]) if finalists else []
            self.ledger.spent += (len(tried) + 1) * PART + len(measured)
            exact = dict(zip(map(int, finalists), measured, strict=True))
            best = min(exact, key=lambda k: _decisive(exact[k]), default=None)
            if best is None:
                self.ledger.note("exchange", self.damage, False)
            if best is None or not self._moved("exchange", tried[best], exact[best]):
                break
            taken = True
        return taken

    def _means(self, assignments: Sequence[Assignment], share: float) -> list[float]:
        return [_decisive(rows) for rows in self.measurements.rows([self.entries(one) for one in assignments], share)]

    def _promising(self, count: int) -> Iterator[Assignment]:
        """The exchanges (one choice, or two) within the limits with the least predicted change."""
        assert self.local is not None
        reduced = presolve(self.local)
        search = LocalSearch(reduced.problem)
        search.place(_positions(reduced, self.assignment))
        for options in search.best_moves(count):
            yield reduced.expand(search.arrays.assignment(search.with_options(options)))


def _decisive(rows: Floats) -> float:
    """Mean damage by the first measure."""
    return float(rows[0].mean())


def _sure(gains: Sequence[Floats]) -> bool:
    """Whether gains, a draw each, (measures, samples), are above zero, not by chance, with no other measure worse."""
    gain, *others = np.mean(gains, axis=0)
    error = gain.std(ddof=1) / len(gain) ** 0.5 if len(gain) > 1 else 0.0
    return bool(gain.mean() > SURE * error and all(other.mean() >= 0 for other in others))


def _positions(reduced: Presolved, assignment: Assignment) -> Integers:
    """Positions of the reduced problem's options that stand for an assignment of the original one."""
    options = [
        next(k for k, origin in enumerate(back) if all(assignment[i] == option for i, option in origin))
        for back in reduced.back
    ]
    return np.array(reduced.problem.positions(options), dtype=np.int64)
