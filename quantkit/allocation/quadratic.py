"""The quadratic objective, exactly where that can be: branch and bound on the convex relaxation, enumeration at the
leaves.

Swaps find the assignment; the search proves it, or improves it, or reports how far the best bound still is. At every
node the relaxation drops the options that no better assignment can take; what is left is often small enough to be
enumerated.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from quantkit.allocation.arrays import Arrays
from quantkit.allocation.enumerate_halves import enumerate_halves
from quantkit.allocation.problem import Assignment, Choice, Found, Problem
from quantkit.allocation.registry import NoAssignment, Settings, solver
from quantkit.allocation.relaxation import relax
from quantkit.allocation.swaps import swaps

MOST_COMBINATIONS = 2**25
_AT_A_LEAF = 2**16
_NODES = 400

Mask = npt.NDArray[np.bool_]


@solver("quadratic", pairs=True)
def quadratic(problem: Problem, settings: Settings) -> Found:
    """The proven optimum up to 2**25 combinations (12 choices of 4 options); beyond, swaps and a limited tree
    search.
    """
    if problem.combinations <= MOST_COMBINATIONS:
        return enumerate_halves(problem)
    found = swaps(problem, settings)
    return _Tree(problem, found, min(settings.nodes, _NODES)).search()


@dataclass(eq=False)
class _Tree:
    """Best-first branch and bound: the best assignment so far and its objective, nodes left to look at."""

    problem: Problem
    found: Found
    nodes: int

    def search(self) -> Found:
        """The best assignment and the least bound of what was not looked at."""
        self.best, self.lowest = self.found.assignment, self.problem.objective(self.found.assignment)
        everything = np.ones(self.problem.offsets[-1], dtype=bool)
        heap: list[tuple[float, int, Mask]] = [(self.found.bound, 0, everything)]
        pushed = 0
        while heap and heap[0][0] < self.lowest and self.nodes:
            self.nodes -= 1
            bound, _, mask = heapq.heappop(heap)
            for child_bound, child in self._children(bound, mask):
                pushed += 1
                heapq.heappush(heap, (child_bound, pushed, child))
        return Found(self.best, min(self.lowest, heap[0][0] if heap else math.inf))

    def _children(self, bound: float, mask: Mask) -> list[tuple[float, Mask]]:
        """The node split by the options of its least decided choice, without what cannot be better than the best."""
        kept = np.flatnonzero(mask)
        part = _restricted(self.problem, mask)
        if part is None:
            return []
        arrays = Arrays.of(part)
        relaxation = relax(part, arrays)
        left = relaxation.forced < self.lowest
        mask = np.zeros_like(mask)
        mask[kept[left]] = True
        part = _restricted(self.problem, mask)
        if part is None:
            return []
        if part.combinations <= _AT_A_LEAF:
            self._look_at_all(part, mask)
            return []
        open_choices = np.add.reduceat(left, arrays.offsets[:-1]) > 1
        weight = np.maximum.reduceat(relaxation.point, arrays.offsets[:-1])
        choice = int(np.where(open_choices, weight, np.inf).argmin())
        children = []
        for position in np.flatnonzero(left & (arrays.choice == choice)):
            child = mask.copy()
            child[kept[(arrays.choice == choice) & (np.arange(len(kept)) != position)]] = False
            children.append((max(bound, float(relaxation.forced[position])), child))
        return children

    def _look_at_all(self, part: Problem, mask: Mask) -> None:
        try:
            assignment = _original(self.problem, mask, enumerate_halves(part).assignment)
        except NoAssignment:
            return
        if (objective := self.problem.objective(assignment)) < self.lowest:
            self.best, self.lowest = assignment, objective


def _restricted(problem: Problem, mask: Mask) -> Problem | None:
    """The problem with some of its options; None when a choice has none left."""
    choices = []
    for choice, start in zip(problem.choices, problem.offsets, strict=False):
        options = tuple(option for k, option in enumerate(choice.options) if mask[start + k])
        if not options:
            return None
        choices.append(Choice(choice.name, options))
    pairs = None if problem.pairs is None else problem.pairs[np.ix_(mask, mask)]
    return replace(problem, choices=tuple(choices), pairs=pairs)


def _original(problem: Problem, mask: Mask, assignment: Assignment) -> Assignment:
    """The assignment of a restricted problem in the numbers of the whole one."""
    starts = problem.offsets
    kept = [np.flatnonzero(mask[a:b]) for a, b in pairwise(starts)]
    return tuple(int(options[k]) for options, k in zip(kept, assignment, strict=True))
