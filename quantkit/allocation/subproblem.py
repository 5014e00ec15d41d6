"""A problem restricted to some of its options, and its assignments in the numbers of the whole one."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from quantkit.allocation.problem import Assignment, Choice, Problem

Mask = npt.NDArray[np.bool_]


def subproblem(problem: Problem, mask: Mask) -> tuple[Problem, Mask] | None:
    """(the problem with some of its options, which): those of ``mask`` whose tag all that must agree still offer.
    None when a choice has none left."""
    mask = mask & _offered(problem, mask)
    choices = []
    for choice, start in zip(problem.choices, problem.offsets, strict=False):
        options = tuple(option for k, option in enumerate(choice.options) if mask[start + k])
        if not options:
            return None
        choices.append(Choice(choice.name, options))
    pairs = None if problem.pairs is None else problem.pairs[np.ix_(mask, mask)]
    return replace(problem, choices=tuple(choices), pairs=pairs), mask


def _offered(problem: Problem, mask: Mask) -> Mask:
    """Which options have a tag that every member of their group offers within ``mask``."""
    offered = np.ones(len(mask), dtype=bool)
    where = {choice.name: (choice, start) for choice, start in zip(problem.choices, problem.offsets, strict=False)}
    for group in problem.agree:
        tags = [[option.tag for option in where[name][0].options] for name in group]
        starts = [where[name][1] for name in group]
        left = [{tag for k, tag in enumerate(own) if mask[a + k]} for own, a in zip(tags, starts, strict=True)]
        common = set.intersection(*left)
        for own, start in zip(tags, starts, strict=True):
            offered[start : start + len(own)] = [tag in common for tag in own]
    return offered


def original(problem: Problem, mask: Mask, assignment: Assignment) -> Assignment:
    """The assignment of a restricted problem in the numbers of the whole one."""
    kept = [np.flatnonzero(mask[a:b]) for a, b in pairwise(problem.offsets)]
    return tuple(int(options[k]) for options, k in zip(kept, assignment, strict=True))
