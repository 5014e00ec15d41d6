"""The slow twin of the solvers: every combination is looked at. Shares no code with what it checks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from quantkit.allocation.problem import Choice, Option, Problem

_AT_ONCE = 2**18
TAGS = ("a4", "a8")
BITS = (2, 3, 4, 5, 6, 7, 8, 16)


@dataclass(frozen=True, eq=False)
class Listed:
    """Assignments whose groups hold: option indices (N, choices), costs (N, limits), sum of damages and objective of
    each (N,)."""

    options: np.ndarray
    costs: np.ndarray
    sums: np.ndarray
    objectives: np.ndarray

    def within(self, limits: Sequence[int]) -> np.ndarray:
        return (self.costs <= np.array(limits, dtype=np.int64)).all(axis=1)


def listed(problem: Problem) -> Iterator[Listed]:
    """Every consistent assignment, some hundred thousand at a time."""
    counts = [len(choice.options) for choice in problem.choices]
    split = len(counts)
    while split and math.prod(counts[split - 1 :]) <= _AT_ONCE:
        split -= 1
    tail = np.array(list(itertools.product(*map(range, counts[split:]))), dtype=np.int64)
    for head in itertools.product(*map(range, counts[:split])):
        options = np.hstack([np.tile(np.array(head, dtype=np.int64), (len(tail), 1)), tail])
        yield _counted(problem, options[_consistent(problem, options)])


def everything(problem: Problem) -> Listed:
    """All consistent assignments of a small problem."""
    parts = list(listed(problem))
    fields = ("options", "costs", "sums", "objectives")
    return Listed(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))


def _consistent(problem: Problem, options: np.ndarray) -> np.ndarray:
    names = [choice.name for choice in problem.choices]
    good = np.ones(len(options), dtype=bool)
    for groups, key in ((problem.same, lambda o: (o.name, o.tag)), (problem.agree, lambda o: o.tag)):
        for group in groups:
            codes: dict[object, int] = {}
            members = [names.index(name) for name in group]
            columns = [
                np.array([codes.setdefault(key(o), len(codes)) for o in problem.choices[i].options])[options[:, i]]
                for i in members
            ]
            for column in columns[1:]:
                good &= column == columns[0]
    return good


def _counted(problem: Problem, options: np.ndarray) -> Listed:
    costs = np.zeros((len(options), len(problem.limits)), dtype=np.int64)
    sums = np.zeros(len(options))
    starts = np.cumsum([0] + [len(choice.options) for choice in problem.choices])
    for i, choice in enumerate(problem.choices):
        costs += np.array([o.costs for o in choice.options], dtype=np.int64).reshape(
            len(choice.options), costs.shape[1]
        )[options[:, i]]
        sums += np.array([o.damage for o in choice.options])[options[:, i]]
    if problem.pairs is None:
        return Listed(options, costs, sums, sums)
    objectives = np.zeros(len(options))
    rows = np.ascontiguousarray((starts[:-1] + options).T)
    for i, j in itertools.combinations_with_replacement(range(len(problem.choices)), 2):
        twice = 0.5 if i == j else 1.0  # the matrix is symmetric
        objectives += twice * problem.pairs[rows[i], rows[j]]
    return Listed(options, costs, sums, objectives)


def optimum(problem: Problem, separable: bool = False) -> float | None:
    """The least objective (``separable``: sum of damages) within the limits; None where nothing is."""
    limits, lowest = [limit for _, limit in problem.limits], math.inf
    for part in listed(problem):
        values = (part.sums if separable else part.objectives)[part.within(limits)]
        lowest = min(lowest, float(values.min(initial=math.inf)))
    return None if lowest == math.inf else lowest


def smallest(problem: Problem, name: str, held: Sequence[str]) -> int | None:
    """The least cost under a limit while the limits of ``held`` hold; None where those cannot hold."""
    names = [limit for limit, _ in problem.limits]
    found = everything(problem)
    limits = [limit if other in held else 2**62 for other, limit in problem.limits]
    costs = found.costs[found.within(limits), names.index(name)]
    return int(costs.min()) if len(costs) else None


def front(costs: np.ndarray, values: np.ndarray) -> list[tuple[int, float]]:
    """(cost, value) of everything nothing else beats, cheapest first."""
    kept: list[tuple[int, float]] = []
    for cost, value in sorted(zip(costs.tolist(), values.tolist(), strict=True)):
        if not kept or value < kept[-1][1]:
            kept.append((cost, value))
    return kept


def hull_value(points: Sequence[tuple[int, float]], cost: float) -> float:
    """Height of the lower convex hull of points at a cost: the least of all chords over it, one by one."""
    exact = [value for at, value in points if at == cost]
    chords = [
        left[1] + (right[1] - left[1]) * (cost - left[0]) / (right[0] - left[0])
        for left, right in itertools.combinations(points, 2)
        if left[0] < cost < right[0]
    ]
    return min([*exact, *chords])


def random_problem(
    draw: np.random.Generator,
    choices: tuple[int, int] = (1, 6),
    options: tuple[int, int] = (1, 5),
    limits: tuple[int, int] = (1, 3),
    groups: bool = True,
    pairs: bool = False,
    dimensions: int | None = None,
) -> Problem:
    """A problem like those of networks: damage falls fourfold a bit, costs rise with the bits, sizes differ widely.

    Groups always have an option in common; the limits need not be within reach."""
    count, kinds = int(draw.integers(choices[0], choices[1] + 1)), int(draw.integers(limits[0], limits[1] + 1))
    tagged, sizes = groups and bool(draw.random() < 0.5), 10 ** draw.uniform(1, 6, (count, kinds))
    made = []
    for i in range(count):
        width = int(draw.integers(options[0], options[1] + 1))
        sensitivity, bits = 10 ** draw.uniform(-4, 1), sorted(draw.permutation(BITS)[:width].tolist())
        made.append(_random_choice(draw, f"c{i}", bits, sensitivity, sizes[i], tagged))
    matrix = random_pairs(draw, made, dimensions) if pairs else None
    if matrix is not None:
        made = with_damages(made, matrix)
    return Problem(
        tuple(made), random_limits(draw, made, kinds), matrix, *(_random_groups(draw, made) if groups else ())
    )


def _random_choice(
    draw: np.random.Generator, name: str, bits: Sequence[int], sensitivity: float, sizes: np.ndarray, tagged: bool
) -> Choice:
    found = []
    for b, tag in itertools.product(bits, TAGS if tagged else ("",)):
        costs = tuple(int(size * (b if k == 0 else b * draw.uniform(0.5, 1.5))) for k, size in enumerate(sizes))
        found.append(Option(f"w{b}", float(sensitivity * 4.0**-b * draw.uniform(0.5, 2)), costs, tag))
    return Choice(name, tuple(found))


def _random_groups(draw: np.random.Generator, choices: Sequence[Choice]) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """(same, agree): pairs of choices that offer the same options, and threes that take one tag."""
    offers = {choice.name: tuple((o.name, o.tag) for o in choice.options) for choice in choices}
    names = draw.permutation(list(offers)).tolist()
    pairs = [(a, b) for a, b in zip(names[::2], names[1::2], strict=False) if offers[a] == offers[b]]
    same = tuple(pair for pair in pairs if draw.random() < 0.5)
    names = draw.permutation(names).tolist()
    return same, tuple(tuple(names[k : k + 3]) for k in range(0, len(names), 3) if draw.random() < 0.7)


def random_limits(draw: np.random.Generator, choices: Sequence[Choice], count: int) -> tuple[tuple[str, int], ...]:
    """Limits between the least and the most that can be spent, and sometimes below."""
    limits = []
    for k in range(count):
        least, most = (sum(f(o.costs[k] for o in choice.options) for choice in choices) for f in (min, max))
        limits.append((f"limit{k}", int(least + draw.uniform(-0.02, 0.8 if count == 1 else 1.0) * (most - least))))
    return tuple(limits)


def random_pairs(draw: np.random.Generator, choices: Sequence[Choice], dimensions: int | None = None) -> np.ndarray:
    """Gram matrix of random output shifts, each as long as its damage asks.

    In few dimensions shifts cancel as no network's do; many are like a network's."""
    damage = np.array([option.damage for choice in choices for option in choice.options])
    shifts = draw.normal(size=(len(damage), dimensions or int(draw.choice([2, 8, 64]))))
    shifts += draw.uniform(0, 1) * draw.normal(size=shifts.shape[1])
    shifts *= np.sqrt(2 * damage / np.square(shifts).sum(axis=1))[:, None]
    matrix = shifts @ shifts.T
    return 0.5 * (matrix + matrix.T)


def with_damages(choices: Sequence[Choice], matrix: np.ndarray) -> list[Choice]:
    """The choices with half the diagonal of the pair terms as damages."""
    alone = iter((0.5 * np.diag(matrix)).tolist())
    return [
        Choice(choice.name, tuple(Option(o.name, next(alone), o.costs, o.tag) for o in choice.options))
        for choice in choices
    ]
