"""A limit on accuracy: what is returned was evaluated, meets the limit, and is the cheapest that was seen to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.allocation.accuracy_search import (
    AccuracyGate,
    along_front,
    between,
    by_levels,
    drop_of,
    first_that_meets,
    rising,
)
from quantkit.errors import InvalidRequest
from quantkit.formats import Scheme
from quantkit.plan import Plan


def front_of(count: int) -> list[Plan]:
    names = [f"layer{i}" for i in range(count)]
    plans = [{n: Scheme.parse("w8a8" if k <= i else "w4a8") for k, n in enumerate(names)} for i in range(-1, count)]
    return [Plan(schemes=schemes, size_bytes=100 + i) for i, schemes in enumerate(plans)]


def gate_of(drops: Sequence[float], allowed: float) -> tuple[AccuracyGate, list[int]]:
    """A gate that looks up the drop of every plan by its size, and the list of what was evaluated."""
    asked: list[int] = []

    def evaluate(plan: Plan) -> float:
        asked.append(plan.size_bytes - 100)
        return 90 - drops[plan.size_bytes - 100]

    return AccuracyGate(evaluate, 90.0, allowed, lambda plan: plan.size_bytes), asked


@given(st.integers(1, 40), st.floats(-1, 41))
@settings(deadline=None, derandomize=True)
def test_finds_the_cheapest_of_a_monotone_front_in_logarithmic_time(count: int, allowed: float) -> None:
    drops = [float(count - i) for i in range(count + 1)]
    gate, asked = gate_of(drops, allowed)
    found = along_front(front_of(count), gate)
    expected = next((i for i, drop in enumerate(drops) if drop <= allowed), None)
    assert (None if found is None else found.cost - 100) == expected
    assert len(asked) == len(set(asked)) <= math.ceil(math.log2(count + 1)) + 4


@given(st.integers(1, 60), st.integers(0, 61))
@settings(deadline=None, derandomize=True)
def test_rising_in_doubling_steps_finds_one_that_meets_the_limit_and_tries_the_last(count: int, first: int) -> None:
    gate, asked = gate_of([2.0 if i < first else 0.0 for i in range(count + 1)], 1.0)
    found = first_that_meets(front_of(count), gate)
    if first > count:
        assert found is None
        assert asked[-1] == count
    else:
        assert found is not None
        assert first <= found.cost - 100 <= max(2 * first, 1)
    assert len(asked) <= math.log2(count + 1) + 3
    assert first_that_meets([], gate) is None


def test_bisection_goes_down_to_the_least_cost_where_nothing_failed_yet() -> None:
    front = front_of(32)
    gate, asked = gate_of([float(32 - i) for i in range(33)], 25.0)
    gate.look(front[20])
    found = between(gate, lambda cost: front[int(cost) - 100], 10, least=99)
    assert found is not None
    assert found.cost == 107
    assert len(asked) <= 6


@given(st.lists(st.floats(0, 2), min_size=2, max_size=20))
@settings(deadline=None, derandomize=True)
def test_any_front_gives_an_evaluated_plan_that_meets_the_limit_and_no_cheaper_evaluated_one_does(
    drops: list[float],
) -> None:
    gate, asked = gate_of(drops, 1.0)
    found = along_front(front_of(len(drops) - 1), gate)
    if drops[-1] > 1:
        assert found is None
        return
    assert 90 - (90 - drops[int(found.cost) - 100]) <= 1
    assert int(found.cost) - 100 == min(i for i in asked if 90 - (90 - drops[i]) <= 1)
    assert [cost - 100 for cost, _ in gate.curve] == sorted(asked)


def test_neighbours_below_the_bisection_are_evaluated_too() -> None:
    drops = [3.0, 3.0, 0.5, 3.0, 0.5, 0.0]
    gate, _ = gate_of(drops, 1.0)
    assert along_front(front_of(5), gate).cost == 102


@given(st.integers(2, 60), st.integers(0, 59), st.integers(1, 8))
@settings(deadline=None, derandomize=True)
def test_between_two_points_of_a_front_a_cheaper_plan_is_found(count: int, needed: int, tries: int) -> None:
    """Every cost has a plan, the front only its ends; plans of at least ``needed`` meet the limit."""
    plans = [Plan(schemes={f"layer{i}": Scheme.parse("w4a8")}, size_bytes=100 + i) for i in range(count)]
    needed = max(1, min(needed, count - 1))
    gate, asked = gate_of([2.0 if i < needed else 0.5 for i in range(count)], 1.0)
    along_front([plans[0], plans[-1]], gate)
    before = len(asked)
    found = between(gate, lambda cost: plans[int(cost) - 100], tries)
    assert found.cost - 100 == min(i for i in asked if i >= needed)
    assert len(asked) - before <= tries
    if 2**tries >= count:
        assert found.cost - 100 == needed


@pytest.mark.parametrize(("apart", "expected"), [(0.001, 150), (0.05, 155), (0.2, 174), (0.6, 199)])
def test_between_stops_where_costs_are_near_enough(apart: float, expected: int) -> None:
    plans = [Plan(schemes={f"layer{i}": Scheme.parse("w4a8")}, size_bytes=100 + i) for i in range(100)]
    gate, _ = gate_of([2.0 if i < 50 else 0.5 for i in range(100)], 1.0)
    along_front([plans[0], plans[-1]], gate)
    found = between(gate, lambda cost: plans[int(cost) - 100], 20, apart=apart)
    assert found.cost == expected


def test_rising_skips_costs_that_are_near_and_ends_with_what_costs_more() -> None:
    front = front_of(40)
    gate, _ = gate_of([2.0] * 10 + [0.5] * 31, 1.0)
    assert list(rising(gate, front, 0.05)) == [front[-1:]]
    for place in (8, 10, 11, 14, 18, 24):
        gate.look(front[place])
    *ones, costlier = rising(gate, front, 0.05)
    assert ones == [[front[place]] for place in (10, 18, 24)]
    assert costlier == front[25:]
    gate.look(front[25])
    assert [[front[24]], [front[25]]] == list(rising(gate, front, 0.05))[-3:-1]


def test_between_finds_a_cheaper_plan_above_a_gap_in_the_costs() -> None:
    """Where one layer dominates, no plan costs what lies between two of its formats."""
    costs = [100, 880, 1000]
    plans = [Plan(schemes={f"layer{c}": Scheme.parse("w4a8")}, size_bytes=c) for c in costs]
    gate, asked = gate_of([2.0 if cost < 500 else 0.5 for cost in range(100, 1001)], 1.0)
    along_front([plans[0], plans[2]], gate)
    found = between(gate, lambda cost: max((p for p in plans if p.size_bytes <= cost), key=lambda p: p.size_bytes), 6)
    assert found.cost == 880
    assert len(asked) == 3


def test_between_is_silent_where_nothing_meets_the_limit() -> None:
    gate, _ = gate_of([3.0, 3.0], 1.0)
    assert along_front(front_of(1), gate) is None
    assert between(gate, lambda cost: pytest.fail("asked for a plan"), 4) is None


def test_cheapest_meets_the_other_limits_too() -> None:
    plans = front_of(3)
    gate = AccuracyGate(
        lambda plan: 0.0, 0.0, 1.0, lambda plan: plan.size_bytes, admits=lambda plan: plan.size_bytes > 101
    )
    for plan in plans:
        gate.look(plan)
    assert gate.cheapest().cost == 102


LAYERS = ("a", "b", "c", "d", "e")
LEVELS = [dict.fromkeys(LAYERS, Scheme.parse(text)) for text in ("w8a8", "w4a8", "w2a8")]


def plan_of(schemes: Mapping[str, Scheme]) -> Plan:
    return Plan(schemes=dict(schemes), size_bytes=sum(s.weight.bits for s in schemes.values()))


def additive(costs: Mapping[str, float]) -> Callable[[Plan], float]:
    """Each layer loses its cost at 4 bits and three times as much at 2."""
    return lambda plan: -sum(costs[n] * {8: 0, 4: 1, 2: 3}[s.weight.bits] for n, s in plan.schemes.items())


def test_levels_lower_the_longest_prefix_and_only_those_go_on() -> None:
    costs = {"a": 0.1, "b": 0.1, "c": 0.2, "d": 0.4, "e": 9.0}
    gate = AccuracyGate(additive(costs), 0.0, 1.0, lambda plan: plan.size_bytes)
    found = by_levels(LAYERS, LEVELS, plan_of, gate)
    # four layers at 4 bits lose 0.8, lowering "a" to 2 bits loses 0.2 more
    assert {n: s.weight.bits for n, s in found.plan.schemes.items()} == {"a": 2, "b": 4, "c": 4, "d": 4, "e": 8}
    assert found.drop == pytest.approx(1.0)


def test_levels_that_cannot_start_or_are_free_of_loss() -> None:
    nothing = dict.fromkeys(LAYERS, 0.0)
    gate = AccuracyGate(additive(nothing), 0.0, 1.0, lambda plan: plan.size_bytes)
    assert all(s.weight.bits == 2 for s in by_levels(LAYERS, LEVELS, plan_of, gate).plan.schemes.values())
    hopeless = AccuracyGate(lambda plan: -5.0, 0.0, 1.0, lambda plan: plan.size_bytes)
    assert by_levels(LAYERS, LEVELS, plan_of, hopeless) is None
    assert hopeless.curve == ((40, 5.0),)


def test_confidence_bound_covers_the_true_drop_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        before = draw.random(400) < 0.9
        after = np.where(draw.random(400) < 0.1, draw.random(400) < 0.6, before)  # true drop 0.1 x (0.9 - 0.6)
        _, bound = drop_of(before.astype(float), after.astype(float))
        covered += bound >= 0.03
    assert covered / 2000 == pytest.approx(0.95, abs=0.02)


def test_confident_gate_is_stricter_and_needs_numbers_per_sample() -> None:
    before, after = [1.0] * 99 + [1.0], [1.0] * 99 + [0.0]
    plan = plan_of(LEVELS[0])
    assert AccuracyGate(lambda p: after, before, 0.015, lambda p: 0).meets(plan)
    assert not AccuracyGate(lambda p: after, before, 0.015, lambda p: 0, confident=True).meets(plan)
    with pytest.raises(InvalidRequest, match="needs one number per sample"):
        AccuracyGate(lambda p: 1.0, 1.0, 0.5, lambda p: 0, confident=True)
    with pytest.raises(InvalidRequest, match="99 numbers for a plan and 100"):
        drop_of(before, after[:-1])
    with pytest.raises(InvalidRequest, match="not finite"):
        drop_of(1.0, math.nan)
