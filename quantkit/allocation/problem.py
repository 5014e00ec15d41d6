"""The decision as pure numbers: one option per choice, total damage as small as the limits allow.

A multiple-choice knapsack with any number of limits (HAWQ-V3, arXiv 2011.10680, section 3.4). With ``pairs`` the
objective is the quadratic form of the Gram matrix of output shifts instead of a sum. Layers and formats are
matters of ``from_profile``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from quantkit.errors import InvalidRequest

Assignment = tuple[int, ...]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
_LARGEST_TOTAL = 2**62


@dataclass(frozen=True)
class Option:
    """One alternative of a choice: its damage and its cost under each limit. ``tag`` is what ``agree`` compares."""

    name: str
    damage: float
    costs: tuple[int, ...] = ()
    tag: str = ""


@dataclass(frozen=True)
class Choice:
    """Exactly one of ``options`` is taken."""

    name: str
    options: tuple[Option, ...]

    def with_options(self, change: Callable[[int, Option], Option]) -> Choice:
        """The choice with every option, given with its index, changed."""
        return Choice(self.name, tuple(change(k, option) for k, option in enumerate(self.options)))


@dataclass(frozen=True, eq=False)
class Problem:
    """Choices, limits on the sums of their costs, and which choices depend on each other.

    ``limits`` are (name, largest total). ``pairs`` is a positive semi-definite matrix over all options in order: the
    objective is half the sum of its chosen rows and columns; without it, the sum of the chosen damages. Choices in a
    group of ``same`` take the option of one name and tag. Choices in a group of ``agree`` take options of one tag: a
    layer's options carry the format of its input, so that costs of both together (bit-operations) stay sums. Raises
    InvalidRequest when malformed."""

    choices: tuple[Choice, ...]
    limits: tuple[tuple[str, int], ...] = ()
    pairs: Floats | None = None
    same: tuple[tuple[str, ...], ...] = ()
    agree: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        names = [choice.name for choice in self.choices]
        if len(set(names)) != len(names):
            raise InvalidRequest("Two choices have one name.")
        for group in (*self.same, *self.agree):
            if unknown := set(group) - set(names):
                raise InvalidRequest(f"A group names {min(unknown)!r}, which is not a choice.")
        for choice in self.choices:
            _check_choice(choice, len(self.limits))
        for k, (name, _) in enumerate(self.limits):
            if sum(max(option.costs[k] for option in choice.options) for choice in self.choices) > _LARGEST_TOTAL:
                raise InvalidRequest(f"Costs under the limit {name!r} add up beyond 2**62: count in a larger unit.")
        if self.pairs is not None:
            _check_pairs(self.pairs, self.offsets[-1])

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each choice's options begin among all options; the last entry is their number."""
        return tuple(accumulate((len(choice.options) for choice in self.choices), initial=0))

    def chosen(self, assignment: Sequence[int]) -> Iterator[Option]:
        """The options an assignment (an option index per choice) takes."""
        return (choice.options[k] for choice, k in zip(self.choices, assignment, strict=True))

    def positions(self, assignment: Sequence[int]) -> list[int]:
        """Positions of the chosen options among all options."""
        return [start + k for start, k in zip(self.offsets[:-1], assignment, strict=True)]

    def cost(self, assignment: Sequence[int]) -> tuple[int, ...]:
        """Total cost under each limit, in exact integers."""
        taken = list(self.chosen(assignment))
        return tuple(sum(option.costs[k] for option in taken) for k in range(len(self.limits)))

    def separable_objective(self, assignment: Sequence[int]) -> float:
        """Sum of the damages alone."""
        return math.fsum(option.damage for option in self.chosen(assignment))

    def objective(self, assignment: Sequence[int]) -> float:
        """Half the sum of the chosen rows and columns of ``pairs``; the sum of the damages where there are none."""
        if self.pairs is None:
            return self.separable_objective(assignment)
        rows = self.positions(assignment)
        return 0.5 * float(self.pairs[np.ix_(rows, rows)].sum())

    def consistent(self, assignment: Sequence[int]) -> bool:
        """Whether every ``same`` and ``agree`` group holds."""
        taken = {choice.name: option for choice, option in zip(self.choices, self.chosen(assignment), strict=True)}
        alike = all(len({(taken[n].name, taken[n].tag) for n in group}) <= 1 for group in self.same)
        return alike and all(len({taken[n].tag for n in group}) <= 1 for group in self.agree)

    def within_limits(self, assignment: Sequence[int]) -> bool:
        return all(used <= limit for used, (_, limit) in zip(self.cost(assignment), self.limits, strict=True))

    def feasible(self, assignment: Sequence[int]) -> bool:
        """Whether an assignment meets every limit and every group."""
        return self.within_limits(assignment) and self.consistent(assignment)


def _check_choice(choice: Choice, limits: int) -> None:
    if not choice.options:
        raise InvalidRequest(f"The choice {choice.name!r} has no option.")
    if len({(option.name, option.tag) for option in choice.options}) != len(choice.options):
        raise InvalidRequest(f"The choice {choice.name!r} has one option twice.")
    for option in choice.options:
        if len(option.costs) != limits or not all(isinstance(c, int) and c >= 0 for c in option.costs):
            raise InvalidRequest(
                f"Option {option.name!r} of {choice.name!r} needs {limits} costs, integers of at least 0; "
                f"got {option.costs}."
            )
        if not math.isfinite(option.damage):
            raise InvalidRequest(
                f"Option {option.name!r} of {choice.name!r} has damage {option.damage}: measure it again."
            )


def _check_pairs(pairs: Floats, count: int) -> None:
    if pairs.shape != (count, count):
        raise InvalidRequest(f"The pair terms are {pairs.shape}, for {count} options they must be {(count, count)}.")
    if not np.isfinite(pairs).all() or not np.allclose(
        pairs, pairs.T, rtol=1e-8, atol=1e-12 * float(np.abs(pairs).max(initial=0.0))
    ):
        raise InvalidRequest("The pair terms must be finite and symmetric: measure the profile again.")


@dataclass(frozen=True)
class SolverResult:
    """What a solver returns: an assignment, and a lower bound of what it minimized (-inf where it has none)."""

    assignment: Assignment
    bound: float = -math.inf


@dataclass(frozen=True)
class Solution:
    """A verified assignment. ``bound`` is a lower bound of the objective of any feasible assignment, ``gap`` the
    distance to it relative to the objective, ``proven`` whether that is all that was asked for (``Settings.gap``)."""

    assignment: Assignment
    objective: float
    bound: float
    gap: float
    solver: str
    proven: bool
