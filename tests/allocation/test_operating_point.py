"""A plan improved by measuring around it: never worse, inside its limits, no more measurements than allowed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from quantkit.allocation.allocate import allocate
from quantkit.allocation.from_profile import AllocationProblem, allocation_problem, assignment_of
from quantkit.allocation.operating_point import improve
from quantkit.budget import Budget
from quantkit.plan import Layer, Profile, SiteRecord

BITS = (2, 3, 4, 8)


class Saturating:
    """Damage that a network might have: a quadratic form of the formats chosen, which bends where it is large."""

    draws = 1

    def __init__(self, profile: Profile, seed: int) -> None:
        draw = np.random.default_rng(seed)
        steps = np.array([2.0 ** -int(fmt[1:]) for _, fmt in profile.entries])
        self.vectors = draw.normal(size=(len(steps), 6)) * steps[:, None] * 2
        self.profile, self.cost = profile, 0.0

    def value(self, entries: Sequence[int]) -> float:
        return float(np.tanh(np.square(self.vectors[list(entries)].sum(0)).sum())) + 0.05

    def rows(self, many: Sequence[Sequence[int]], share: float = 1.0, draw: int = 0) -> list[np.ndarray]:
        self.cost += share * len(many)
        return [np.array([[self.value(entries)]]) for entries in many]

    def around(self, entries: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        owners = [owner for owner, _ in self.profile.entries]
        base = {owners[k]: k for k in entries}
        self.cost += 1 + len(owners) - len(entries)
        damage = np.array([self.value(list((base | {owners[k]: k}).values())) for k in range(len(owners))])
        shifts = np.array([self.vectors[k] - self.vectors[base[owners[k]]] for k in range(len(owners))])
        return damage, 2 * shifts @ shifts.T * (1 - self.value(entries) ** 2)


def profile_of(layers: int, seed: int) -> Profile:
    draw = np.random.default_rng(seed)
    shapes = {f"layer{i}": (8, int(draw.integers(1, 5)) * 8, 3, 3) for i in range(layers)}
    records = {
        name: Layer(name, "conv2d", shape, 4 * int(np.prod(shape)), inputs=("input",))
        for name, shape in shapes.items()
    }
    entries = [(name, f"w{b}") for name in shapes for b in BITS] + [("input", "a8")]
    vectors = draw.normal(size=(len(entries), 6)) * np.array([2.0 ** -int(f[1:]) for _, f in entries])[:, None]
    gram = vectors @ vectors.T
    return Profile(
        layers=records,
        sites={"input": SiteRecord("input", 10, tuple(shapes))},
        schemes=tuple(f"w{b}a8" for b in BITS),
        entries=tuple(entries),
        damage=np.diag(gram) / 2,
        gram=gram,
        other_bytes=0,
        float_bytes=sum(layer.float_bytes for layer in records.values()),
        target="onnxruntime-cpu",
    )


def asked_and_start(profile: Profile, budget: str) -> tuple[AllocationProblem, tuple[int, ...]]:
    asked = allocation_problem(profile, Budget.parse(budget).limits(profile))
    plan = allocate(profile, budget)
    start = assignment_of(profile, asked, plan)
    assert asked.decode(start) == ({n: s for n, s in plan.schemes.items() if n in asked.layers}, plan.sites)
    return asked, start


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budget", ["2.75 bits", "4 bits"])
def test_improved_plan_is_never_worse_and_keeps_limits_and_allowance(seed: int, budget: str) -> None:
    profile = profile_of(8, seed)
    asked, start = asked_and_start(profile, budget)
    measure = Saturating(profile, seed)
    allowed = 3 * len(profile.entries)
    found, ledger = improve(profile, asked, start, measure, allowed, seed)
    before, after = (measure.value(profile.chosen(*asked.decode(a))) for a in (start, found))
    assert after <= before
    assert asked.problem.feasible(found)
    assert measure.cost == pytest.approx(ledger.spent)
    assert ledger.spent <= allowed
    assert [step["damage"] for step in ledger.steps if step["accepted"]][-1] == pytest.approx(after)


def test_it_comes_close_to_the_best_plan_there_is() -> None:
    """Against brute force over small networks, whose float profile is unrelated to the true damage."""
    ratios, starts = [], []
    for seed in range(8):
        profile = profile_of(5, seed)
        asked, start = asked_and_start(profile, "3 bits")
        measure = Saturating(profile, seed + 100)
        found, _ = improve(profile, asked, start, measure, 4 * len(profile.entries), seed)
        everything = itertools.product(*(range(len(c.options)) for c in asked.problem.choices))
        best = min(measure.value(profile.chosen(*asked.decode(a))) for a in everything if asked.problem.feasible(a))
        starts.append(measure.value(profile.chosen(*asked.decode(start))) / best)
        ratios.append(measure.value(profile.chosen(*asked.decode(found))) / best)
    assert np.median(ratios) < 1.02
    assert np.median(starts) > 1.05


def test_same_seed_gives_the_same_plan_and_nothing_allowed_changes_nothing() -> None:
    profile = profile_of(8, 1)
    asked, start = asked_and_start(profile, "3 bits")
    runs = [improve(profile, asked, start, Saturating(profile, 3), 100, seed=5)[0] for _ in range(2)]
    assert runs[0] == runs[1] != start
    untouched = Saturating(profile, 3)
    assert improve(profile, asked, start, untouched, 0)[0] == start
    assert untouched.cost == 0


class Noisy(Saturating):
    """The same on 64 inputs, which differ much more than plans do: alike for every plan, or anew for each."""

    def __init__(self, profile: Profile, seed: int, alike: bool) -> None:
        super().__init__(profile, seed)
        self.draw, self.alike = np.random.default_rng(seed), alike

    def rows(self, many: Sequence[Sequence[int]], share: float = 1.0, draw: int = 0) -> list[np.ndarray]:
        if self.alike:
            noise = np.random.default_rng(0).normal(size=64)
            return [one + noise for one in super().rows(many, share)]
        return [self.draw.normal(size=(1, 64)) for _ in many]


def test_what_may_be_chance_is_not_taken_and_what_every_input_says_is() -> None:
    stayed = moved = 0
    for seed in range(10):
        profile = profile_of(8, seed)
        asked, start = asked_and_start(profile, "2.75 bits")
        found, _ = improve(profile, asked, start, Noisy(profile, seed, alike=False), 300, seed)
        stayed += found == start
        found, _ = improve(profile, asked, start, Noisy(profile, seed, alike=True), 300, seed)
        moved += found != start
    assert stayed >= 7
    assert moved >= 7


class Objecting(Saturating):
    """A second gate, who finds worse what the first one finds better."""

    def rows(self, many: Sequence[Sequence[int]], share: float = 1.0, draw: int = 0) -> list[np.ndarray]:
        return [np.vstack([one, 5.0 - one]) for one in super().rows(many, share)]


def test_what_is_worse_by_another_measure_is_not_taken() -> None:
    for seed in range(4):
        profile = profile_of(8, seed)
        asked, start = asked_and_start(profile, "2.75 bits")
        assert improve(profile, asked, start, Saturating(profile, seed), 300, seed)[0] != start
        found, ledger = improve(profile, asked, start, Objecting(profile, seed), 300, seed)
        assert found == start and ledger.spent > 0


class Drawn(Saturating):
    """On 64 inputs that differ as much as the noise of a draw, which hides what a plan gains and averages out."""

    def __init__(self, profile: Profile, seed: int, draws: int) -> None:
        super().__init__(profile, seed)
        self.draws = draws
        self.asked: list[int] = []

    def rows(self, many: Sequence[Sequence[int]], share: float = 1.0, draw: int = 0) -> list[np.ndarray]:
        self.asked.append(draw)
        noise = [np.random.default_rng([draw, *entries]).normal(size=64) for entries in many]
        return [6 * own + one for own, one in zip(super().rows(many, share), noise, strict=True)]


def test_what_one_draw_leaves_open_more_draws_settle() -> None:
    gains = {1: [], 4: []}
    for seed in range(8):
        profile = profile_of(8, seed)
        asked, start = asked_and_start(profile, "2.75 bits")
        for draws, gained in gains.items():
            measure = Drawn(profile, seed, draws)
            found, ledger = improve(profile, asked, start, measure, 300, seed)
            before, after = (measure.value(profile.chosen(*asked.decode(a))) for a in (start, found))
            gained.append(before - after)
            assert max(measure.asked) < draws
            assert measure.cost == pytest.approx(ledger.spent) == sum(step["measurements"] for step in ledger.steps)
    assert sum(gains[4]) > sum(gains[1])
