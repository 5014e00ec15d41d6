"""A problem in the form solvers get: merged choices, impossible tags removed, costs as small integers. Assignments are
mapped back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from quantkit.allocation.problem import Assignment, Choice, Floats, Option, Problem
from quantkit.errors import InvalidRequest


@dataclass(frozen=True)
class Presolved:
    """``problem`` has no ``same``; its ``agree`` groups are disjoint, with two tags or more that every member offers.
    Its costs count from the cheapest option of each choice, in units of their greatest common divisor; limits that
    hold whatever is chosen are left out.

    ``back[i][k]`` lists (original choice, original option) of option k of choice i. ``scale`` has (cost of the
    cheapest options, unit) of every limit of ``problem``.
    """

    problem: Problem
    back: tuple[tuple[tuple[tuple[int, int], ...], ...], ...]
    scale: tuple[tuple[int, int], ...]

    def expand(self, assignment: Sequence[int]) -> Assignment:
        """The assignment of the original problem."""
        pairs = [pair for options, k in zip(self.back, assignment, strict=True) for pair in options[k]]
        return tuple(option for _, option in sorted(pairs))

    def asked_cost(self, limit: int, cost: int) -> int:
        """A total cost under a limit of ``problem``, counted as the original problem counts it."""
        base, unit = self.scale[limit]
        return base + unit * cost


def presolve(problem: Problem) -> Presolved:
    """Merge ``same`` groups (damages, costs and pair terms add up), drop options that no agreement allows, and count
    costs from the cheapest.

    Merged choices have the name of their first member. Raises InvalidRequest, naming the members, where a group has no
    option in common.
    """
    members = connected([choice.name for choice in problem.choices], problem.same)
    first = {name: group[0] for group in members for name in group}
    regrouped = [tuple(dict.fromkeys(first[name] for name in group)) for group in problem.agree]
    components = connected([group[0] for group in members], regrouped)
    index = {choice.name: i for i, choice in enumerate(problem.choices)}
    choices = {group[0]: _merge(problem, [index[n] for n in group]) for group in members}
    tags = {name: _common_tags(component, choices) for component in components for name in component}
    kept: list[Choice] = []
    back: list[tuple[tuple[tuple[int, int], ...], ...]] = []
    for name, (options, origins) in choices.items():
        allowed = tags[name]
        keep = [k for k, option in enumerate(options) if allowed is None or option.tag in allowed]
        kept.append(Choice(name, tuple(options[k] for k in keep)))
        back.append(tuple(origins[k] for k in keep))
    agree = tuple(c for c in components if len(c) > 1 and len(tags[c[0]] or ()) > 1)
    pairs = None if problem.pairs is None else _merge_pairs(problem, back)
    counted, limits, scale = _counted_from_cheapest(kept, problem.limits)
    return Presolved(Problem(counted, limits, pairs, (), agree), tuple(back), scale)


def _counted_from_cheapest(
    choices: Sequence[Choice], limits: Sequence[tuple[str, int]]
) -> tuple[tuple[Choice, ...], tuple[tuple[str, int], ...], tuple[tuple[int, int], ...]]:
    """(choices with costs above the cheapest option in units of their gcd, limits that can be broken, (base, unit) of
    each)."""
    columns: list[list[list[int]]] = []
    kept: list[tuple[str, int]] = []
    scale: list[tuple[int, int]] = []
    for k, (name, limit) in enumerate(limits):
        costs = [[option.costs[k] for option in choice.options] for choice in choices]
        base = sum(min(own) for own in costs)
        above = [[cost - min(own) for cost in own] for own in costs]
        unit = max(1, math.gcd(*(cost for own in above for cost in own)))
        if base + sum(max(own) for own in above) <= limit:
            continue
        columns.append([[cost // unit for cost in own] for own in above])
        kept.append((name, (limit - base) // unit))
        scale.append((base, unit))

    def relative(i: int, choice: Choice) -> Choice:
        return choice.with_options(lambda k, option: replace(option, costs=tuple(column[i][k] for column in columns)))

    return tuple(relative(i, choice) for i, choice in enumerate(choices)), tuple(kept), tuple(scale)


def connected(names: Iterable[str], groups: Iterable[Sequence[str]]) -> list[tuple[str, ...]]:
    """The names in sets that groups sharing a member join together, in the order of their first members."""
    of = {name: [name] for name in names}
    order = {name: i for i, name in enumerate(of)}
    for group in groups:
        for name in group[1:]:
            if of[name] is not of[group[0]]:
                joined = of[group[0]] + of[name]
                of.update(dict.fromkeys(joined, joined))
    sets = {id(group): tuple(sorted(group, key=order.__getitem__)) for group in of.values()}
    return sorted(sets.values(), key=lambda group: order[group[0]])


def _merge(problem: Problem, group: Sequence[int]) -> tuple[list[Option], list[tuple[tuple[int, int], ...]]]:
    """The options that all choices of a group offer, added up, and what each stands for."""
    offers = [{(o.name, o.tag): k for k, o in enumerate(problem.choices[i].options)} for i in group]
    common = [key for key in offers[0] if all(key in offer for offer in offers)]
    if not common:
        names = ", ".join(repr(problem.choices[i].name) for i in group)
        raise InvalidRequest(f"{names} must take the same option, but no option is offered by all of them.")
    options, origins = [], []
    for name, tag in common:
        taken = [(i, offer[name, tag]) for i, offer in zip(group, offers, strict=True)]
        parts = [problem.choices[i].options[k] for i, k in taken]
        costs = tuple(sum(values) for values in zip(*(part.costs for part in parts), strict=True))
        options.append(Option(name, math.fsum(part.damage for part in parts), costs, tag))
        origins.append(tuple(taken))
    return options, origins


def _common_tags(
    component: Sequence[str], choices: dict[str, tuple[list[Option], list[tuple[tuple[int, int], ...]]]]
) -> tuple[str, ...] | None:
    """The tags that all members of a component offer; None where a choice agrees with itself only."""
    if len(component) == 1:
        return None
    offered = [dict.fromkeys(option.tag for option in choices[name][0]) for name in component]
    common = tuple(tag for tag in offered[0] if all(tag in tags for tags in offered))
    if not common:
        names = ", ".join(repr(name) for name in component)
        raise InvalidRequest(f"{names} must agree on one format, but no format is offered by all of them.")
    return common


def _merge_pairs(problem: Problem, back: Sequence[Sequence[tuple[tuple[int, int], ...]]]) -> Floats:
    """Pair terms of merged options: the sums over what they stand for."""
    assert problem.pairs is not None
    offsets = problem.offsets
    flat = [[offsets[i] + k for i, k in origin] for options in back for origin in options]
    if all(len(positions) == 1 for positions in flat):
        rows = [positions[0] for positions in flat]
        return problem.pairs[np.ix_(rows, rows)]
    incidence = np.zeros((len(flat), problem.pairs.shape[0]))
    for row, positions in enumerate(flat):
        incidence[row, positions] = 1.0
    merged: Floats = incidence @ problem.pairs @ incidence.T
    return 0.5 * (merged + merged.T)
