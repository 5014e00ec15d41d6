"""The quadratic objective, exact where that is affordable: branch and bound on the convex relaxation, enumeration at
the leaves.

Swaps find the assignment; the search proves it, or improves it, or reports how far the best bound still is. At every
node the relaxation drops the options that no better assignment can take; what is left is often small enough to be
enumerated.
"""

from __future__ import annotations

import heapq
import math

import numpy as np

from quantkit.allocation.enumeration import can_enumerate, enumerate_halves
from quantkit.allocation.problem import Problem, SolverResult
from quantkit.allocation.problem_arrays import ProblemArrays
from quantkit.allocation.registry import NoAssignment, Settings
from quantkit.allocation.relaxation import relax
from quantkit.allocation.subproblem import Mask, original, subproblem
from quantkit.allocation.swaps import swaps

_AT_A_LEAF = 2**16
_NODES = 400
_OPTIONS_AT_ALL_NODES = 250


def quadratic(problem: Problem, settings: Settings) -> SolverResult:
    """The proven optimum up to 2**25 combinations (12 choices of 4 options); beyond, swaps and a limited tree
    search.
    """
    if can_enumerate(ProblemArrays.of(problem)):
        return enumerate_halves(problem)
    affordable = int(_NODES * min(1.0, (_OPTIONS_AT_ALL_NODES / problem.offsets[-1]) ** 3))
    return _Tree(problem, swaps(problem, settings), min(settings.nodes, affordable)).search()


class _Tree:
    """Best-first branch and bound: the best assignment so far and its objective, nodes left to look at.

    A node is a set of options and a lower bound of what they allow."""

    def __init__(self, problem: Problem, start: SolverResult, nodes: int) -> None:
        self.problem, self.nodes, self.root_bound = problem, nodes, start.bound
        self.best, self.lowest = start.assignment, problem.objective(start.assignment)

    def search(self) -> SolverResult:
        """The best assignment and the least bound of what was not looked at."""
        heap: list[tuple[float, int, Mask]] = [(self.root_bound, 0, np.ones(self.problem.offsets[-1], dtype=bool))]
        pushed = 0
        while heap and heap[0][0] < self.lowest and self.nodes:
            self.nodes -= 1
            bound, _, mask = heapq.heappop(heap)
            for child_bound, child in self._children(bound, mask):
                pushed += 1
                heapq.heappush(heap, (child_bound, pushed, child))
        return SolverResult(self.best, min(self.lowest, heap[0][0] if heap else math.inf))

    def _children(self, bound: float, mask: Mask) -> list[tuple[float, Mask]]:
        """The node split by the options of its least decided choice, without what cannot be better than the best."""
        smaller = subproblem(self.problem, mask)
        if smaller is None:
            return []
        part, mask = smaller
        relaxation = relax(part, ProblemArrays.of(part))
        forced, weight = np.zeros(len(mask)), np.zeros(len(mask))
        forced[mask], weight[mask] = relaxation.forced, relaxation.point
        smaller = subproblem(self.problem, mask & (forced < self.lowest))
        if smaller is None:
            return []
        part, mask = smaller
        if can_enumerate(ProblemArrays.of(part), _AT_A_LEAF):
            self._enumerate(part, mask)
            return []
        starts = self.problem.offsets[:-1]
        decided = np.maximum.reduceat(np.where(mask, weight, 0.0), starts)
        choice = int(np.where(np.add.reduceat(mask.astype(np.int64), starts) > 1, decided, np.inf).argmin())
        own = np.arange(self.problem.offsets[choice], self.problem.offsets[choice + 1])
        children = []
        for option in own[mask[own]]:
            child = mask.copy()
            child[own] = own == option
            children.append((max(bound, float(forced[option])), child))
        return children

    def _enumerate(self, part: Problem, mask: Mask) -> None:
        try:
            assignment = original(self.problem, mask, enumerate_halves(part).assignment)
        except NoAssignment:
            return
        if (objective := self.problem.objective(assignment)) < self.lowest:
            self.best, self.lowest = assignment, objective
