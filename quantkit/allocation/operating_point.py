"""Re-measure where you stand: a plan improved by what is measured around it, not around the float model.

Below four bits the second order at the float point mispredicts (METHODS b). Rounds: measure every single change of the
plan, solve again within a trust region, accept only what lowers the measured damage. Then exchanges (one format up,
one down) judged by measured damage alone, many on a part of the inputs and the best of them on all, as EvoPress
selects (arXiv 2410.14649). A few hundred inputs differ by more than plans do, and the best of many plans looks better
than it is: better is what is better by two standard errors of the difference, input by input. What is measured comes
through ``Measurements``; nothing here knows a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from quantkit.allocation.from_profile import Question, option_entries, with_nothing
from quantkit.allocation.problem import Assignment, Choice, Floats, Integers, Problem
from quantkit.allocation.reduce import Reduced, reduce
from quantkit.allocation.search import Search
from quantkit.plan import Profile

KICKS = 60
CANDIDATES = 16  # exchanges tried on a part of the inputs, and the part
PART = 0.25
FINALISTS = 4
SURE = 2.0  # standard errors by which a plan must be better


class Measurements(Protocol):
    """What may be measured. ``entries`` are positions in the profile's entries: the formats of a plan."""

    def rows(self, many: Sequence[Sequence[int]], share: float = 1.0) -> list[Floats]:
        """Damage of each plan, sample by sample for a share of the inputs (the same ones every time); costs ``share``
        of a measurement each.
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

    def note(self, step: str, cost: float, damage: float, accepted: bool) -> None:
        self.spent += cost
        self.steps.append({"step": step, "measurements": cost, "damage": damage, "accepted": accepted})


def improve(
    profile: Profile,
    asked: Question,
    start: Assignment,
    measurements: Measurements,
    allowed: float,
    seed: int = 0,
) -> tuple[Assignment, Ledger]:
    """The best assignment found with at most ``allowed`` measurements; never one that measures worse than
    ``start``.
    """
    walk = _Walk(profile, asked, start, measurements, Ledger(allowed), np.random.default_rng(seed))
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
    asked: Question
    assignment: Assignment
    measurements: Measurements
    ledger: Ledger
    generator: np.random.Generator
    local: Problem | None = None
    rows: Floats | None = None

    @property
    def damage(self) -> float:
        """Measured damage of the plan that the walk stands on."""
        assert self.rows is not None, "measured before anything is compared"
        return float(self.rows.mean())

    def entries(self, assignment: Assignment) -> list[int]:
        return self.profile.chosen(*self.asked.answer(assignment))

    def look_around(self) -> bool:
        """Measure the plan and every single change of it; False when that is no longer affordable."""
        chosen = self.entries(self.assignment)
        cost = 1 + len(self.profile.entries) - len(chosen) + (self.rows is None)
        if not chosen or not self.ledger.affords(cost):
            return False
        if self.rows is None:
            (self.rows,) = self.measurements.rows([chosen])
        damage, pairs = self.measurements.around(chosen)
        terms = pairs.copy()
        np.fill_diagonal(terms, 2 * (damage - damage[chosen[0]]))
        terms[chosen, chosen] = 0.0
        rows = option_entries(self.profile, self.asked.problem.choices, [*self.asked.layers, *self.asked.sites])
        self.local = replace(self.asked.problem, pairs=with_nothing(terms)[np.ix_(rows, rows)])
        self.ledger.note("look around", cost, self.damage, True)
        return True

    def jump(self) -> bool:
        """Solve again within a trust region, halved until what it proposes measures better."""
        assert self.local is not None
        radius = max(2, len(self.asked.layers) // 2)
        while radius >= 2 and self.ledger.affords(1):
            proposed = self._solve_within(radius)
            if proposed == self.assignment:
                return False
            (rows,) = self.measurements.rows([self.entries(proposed)])
            accepted = self._better(rows)
            self.ledger.note(f"jump within {radius} changes", 1, float(rows.mean()), accepted)
            if accepted:
                self.assignment, self.rows = proposed, rows
                return True
            radius //= 2
        return False

    def _better(self, rows: Floats) -> bool:
        """Whether a plan with this damage is better than the present one, and not by chance."""
        assert self.rows is not None
        gain = self.rows - rows
        error = gain.std(ddof=1) / len(gain) ** 0.5 if len(gain) > 1 else 0.0
        return bool(gain.mean() > SURE * error)

    def _solve_within(self, radius: int) -> Assignment:
        """The least predicted damage with at most ``radius`` choices changed, by swaps from where the walk stands."""
        assert self.local is not None
        choices = tuple(
            Choice(
                choice.name,
                tuple(replace(o, costs=(*o.costs, int(k != now))) for k, o in enumerate(choice.options)),
            )
            for choice, now in zip(self.local.choices, self.assignment, strict=True)
        )
        limited = replace(self.local, choices=choices, limits=(*self.local.limits, ("changes", radius)))
        reduced = reduce(limited)
        search = Search(reduced.problem)
        found = search.improve([_positions(reduced, self.assignment)], self.generator, KICKS)
        return reduced.expand(search.arrays.assignment(found))

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
            exact = dict(zip(map(int, finalists), measured, strict=True))
            best = min(exact, key=lambda k: exact[k].mean(), default=None)
            better = best is not None and self._better(exact[best])
            damage = self.damage if best is None else float(exact[best].mean())
            self.ledger.note("exchange", (len(tried) + 1) * PART + len(exact), damage, better)
            if not better or best is None:
                break
            self.assignment, self.rows, taken = tried[best], exact[best], True
        return taken

    def _means(self, assignments: Sequence[Assignment], share: float) -> list[float]:
        return [float(r.mean()) for r in self.measurements.rows([self.entries(one) for one in assignments], share)]

    def _promising(self, count: int) -> Iterator[Assignment]:
        """The exchanges (one choice, or two) within the limits with the least predicted change."""
        assert self.local is not None
        reduced = reduce(self.local)
        search = Search(reduced.problem)
        search.place(_positions(reduced, self.assignment))
        for options in search.best_moves(count):
            yield reduced.expand(search.arrays.assignment(search.with_options(options)))


def _positions(reduced: Reduced, assignment: Assignment) -> Integers:
    """Positions of the reduced problem's options that stand for an assignment of the original one."""
    options = [
        next(k for k, origin in enumerate(back) if all(assignment[i] == option for i, option in origin))
        for back in reduced.back
    ]
    return np.array(reduced.problem.positions(options), dtype=np.int64)
