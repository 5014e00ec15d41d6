"""A reduced problem as flat numpy arrays, and the one minimization that needs no search: the best option everywhere.

Options of a choice that must agree with others fall into *cells*, one per tag. A *state* is one tag of one set of
agreeing choices: exactly one state per set holds, and in it one option of every cell. A choice on its own is one cell
in one state."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from quantkit.allocation.problem import Assignment, Floats, Integers, Problem


@dataclass(frozen=True, eq=False)
class ProblemArrays:
    """``damage`` (K,) and ``costs`` (K, limits) of all K options, ``limits``; ``choice`` and ``cell`` of each option,
    ``state`` of each cell, ``component`` of each state. All indices count from 0 in order."""

    damage: Floats
    costs: Integers
    limits: Integers
    choice: Integers
    cell: Integers
    state: Integers
    component: Integers
    offsets: Integers

    @classmethod
    def of(cls, problem: Problem) -> ProblemArrays:
        """The arrays of a problem without ``same`` groups."""
        group_of = {name: number for number, group in enumerate(problem.agree) for name in group}
        components: dict[object, int] = {}
        states: dict[tuple[int, str], int] = {}
        cells: dict[tuple[int, int], int] = {}
        choice, cell = [], []
        for i, one in enumerate(problem.choices):
            component = components.setdefault(group_of.get(one.name, one.name), len(components))
            for option in one.options:
                state = states.setdefault((component, option.tag if one.name in group_of else ""), len(states))
                cell.append(cells.setdefault((i, state), len(cells)))
                choice.append(i)
        options = [option for one in problem.choices for option in one.options]
        return cls(
            damage=np.array([option.damage for option in options], dtype=np.float64),
            costs=np.array([option.costs for option in options], dtype=np.int64).reshape(
                len(options), len(problem.limits)
            ),
            limits=np.array([limit for _, limit in problem.limits], dtype=np.int64),
            choice=np.array(choice, dtype=np.int64),
            cell=np.array(cell, dtype=np.int64),
            state=np.array([state for _, state in cells], dtype=np.int64),
            component=np.array([component for component, _ in states], dtype=np.int64),
            offsets=np.array(problem.offsets, dtype=np.int64),
        )

    @cached_property
    def state_of(self) -> Integers:
        """State of each option."""
        return self.state[self.cell]

    def cell_minimum(self, score: Floats) -> tuple[Floats, Integers]:
        """Smallest score in each cell and the position of the option that has it (the first among equals)."""
        first = _first_of_each(self.cell, score, len(self.state))
        return score[first], first

    def lowest(self, score: Floats) -> tuple[Floats, Integers]:
        """Smallest score of each choice and the position of the option that has it (the first among equals)."""
        first = _first_of_each(self.choice, score, len(self.offsets) - 1)
        return score[first], first

    def state_sum(self, cell_values: Floats) -> Floats:
        """Sum over the cells of each state."""
        total: Floats = np.bincount(self.state, weights=cell_values, minlength=len(self.component)).astype(np.float64)
        return total

    def _best_states(self, total: Floats) -> Integers:
        """The state of least total of each component."""
        return _first_of_each(self.component, total, int(self.component.max(initial=-1)) + 1)

    def forced(self, score: Floats) -> tuple[float, Floats]:
        """(least total score, limits ignored; the same for every option when it has to be taken)."""
        minimum, _ = self.cell_minimum(score)
        total = self.state_sum(minimum)
        least = total[self._best_states(total)]
        rest = least.sum() - least[self.component[self.state_of]]
        return float(least.sum()), rest + total[self.state_of] - minimum[self.cell] + score

    def best(self, score: Floats) -> tuple[float, Integers]:
        """The consistent assignment of least total score, limits ignored: (total, positions of its options)."""
        minimum, first = self.cell_minimum(score)
        total = self.state_sum(minimum)
        taken = self._best_states(total)
        holds = np.zeros(len(self.component), dtype=bool)
        holds[taken] = True
        positions = first[holds[self.state]]
        return float(total[taken].sum()), positions[np.argsort(self.choice[positions])]

    def assignment(self, positions: Integers) -> Assignment:
        """Option index per choice of the options at ``positions`` (one per choice, in order)."""
        return tuple(int(k) for k in positions - self.offsets[:-1])

    def within(self, positions: Integers) -> bool:
        """Whether the options at ``positions`` meet every limit, in exact integers."""
        return bool((self.costs[positions].sum(axis=0) <= self.limits).all())

    @cached_property
    def relative_cost(self) -> Floats:
        """Cost of each option, each limit's share of it added up: what "wide" and "cheap" mean under several
        limits."""
        return np.asarray((self.costs / np.maximum(self.limits, 1)).sum(axis=1), dtype=np.float64)

    def smallest(self, limit: int) -> int:
        """The least total cost under one limit, the others ignored."""
        _, positions = self.best(self.costs[:, limit].astype(np.float64))
        return int(self.costs[positions, limit].sum())


def _first_of_each(group: Integers, score: Floats, count: int) -> Integers:
    """The position of the least score in each of ``count`` groups, the first among equals."""
    order = np.lexsort((score, group))
    return order[np.searchsorted(group[order], np.arange(count))]
