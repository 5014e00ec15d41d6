"""Methods of others, by name: uniform, greedy, by rank and BAQ's closed form do what their definitions say, and keep
every limit or give up."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given

from quantkit.allocation.problem import Choice, Option, Problem
from quantkit.allocation.registry import Settings, SolverGaveUp
from quantkit.allocation.solve import solve
from quantkit.errors import InvalidRequest
from quantkit.formats import Scheme
from tests.allocation.helpers import optimum
from tests.allocation.strategies import networks, repeatable

PLAIN = {"limits": (1, 1), "groups": False, "choices": (1, 6), "options": (2, 5)}


def total(problem: Problem, assignment: list[int]) -> int:
    return sum(choice.options[k].costs[0] for choice, k in zip(problem.choices, assignment, strict=True))


def cheapest(choice: Choice) -> int:
    return min(range(len(choice.options)), key=lambda k: (choice.options[k].costs[0], choice.options[k].damage))


def least_damaging(choice: Choice) -> int:
    return min(range(len(choice.options)), key=lambda k: choice.options[k].damage)


def can_be_broken(problem: Problem) -> bool:
    """Whether the limit excludes anything: where it does not, width has no price."""
    return sum(max(o.costs[0] for o in choice.options) for choice in problem.choices) > problem.limits[0][1]


@repeatable(80)
@given(networks(limits=(1, 4)))
@pytest.mark.parametrize("name", ["uniform", "greedy", "by-rank", "baq"])
def test_nothing_is_over_a_limit_or_against_a_group(name: str, problem: Problem) -> None:
    if optimum(problem) is None:
        return
    try:
        found = solve(problem, name)
    except SolverGaveUp as refusal:
        assert "Try solver='auto'" in str(refusal)
        return
    assert problem.feasible(found.assignment)
    best = optimum(problem)
    assert best is not None
    assert found.objective >= best * (1 - 1e-9)
    assert found.bound <= best * (1 + 1e-9)


@repeatable(100)
@given(networks(**PLAIN))
def test_uniform_is_the_widest_name_that_fits(problem: Problem) -> None:
    names = {option.name for choice in problem.choices for option in choice.options}
    plans = []
    for name in names:
        offered = [[o.name for o in choice.options] for choice in problem.choices]
        plan = [
            own.index(name) if name in own else cheapest(choice)
            for own, choice in zip(offered, problem.choices, strict=True)
        ]
        if total(problem, plan) <= problem.limits[0][1]:
            plans.append(plan)
    if not plans:
        return
    found = list(solve(problem, "uniform").assignment)
    assert found in plans
    if can_be_broken(problem):
        assert total(problem, found) == max(total(problem, plan) for plan in plans)
    else:
        assert problem.objective(found) == min(problem.objective(plan) for plan in plans)


@pytest.mark.parametrize("pairs", [False, True], ids=["sum", "pairs"])
def test_greedy_takes_the_least_damage_per_overuse_removed(pairs: bool) -> None:
    @repeatable(80)
    @given(networks(**PLAIN, pairs=pairs, dimensions=64))
    def gate(problem: Problem) -> None:
        if optimum(problem) is None:
            return
        plan, limit = [least_damaging(choice) for choice in problem.choices], problem.limits[0][1]
        while (over := total(problem, plan) - limit) > 0:
            moves = []
            for i, choice in enumerate(problem.choices):
                for k, option in enumerate(choice.options):
                    saved = choice.options[plan[i]].costs[0] - option.costs[0]
                    moved = [*plan[:i], k, *plan[i + 1 :]]
                    if saved > 0:
                        change = max(problem.objective(moved) - problem.objective(plan), 0.0)
                        moves.append((change / min(saved, over), moved))
            plan = min(moves)[1]
        assert list(solve(problem, "greedy").assignment) == plan

    gate()


@repeatable(100)
@given(networks(**PLAIN))
def test_by_rank_gives_each_in_turn_the_widest_that_leaves_room_for_the_rest(problem: Problem) -> None:
    """The order names half of the choices; the others follow, worst off at their cheapest first."""
    if optimum(problem) is None or not can_be_broken(problem):
        return
    named = [choice.name for choice in problem.choices][::-2]
    plan = [cheapest(choice) for choice in problem.choices]
    rest = [i for i, choice in enumerate(problem.choices) if choice.name not in named]
    rest.sort(key=lambda i: -problem.choices[i].options[plan[i]].damage)
    ranked = [next(i for i, c in enumerate(problem.choices) if c.name == name) for name in named] + rest
    for i in ranked:
        options = problem.choices[i].options
        for k in sorted(range(len(options)), key=lambda k: (-options[k].costs[0], options[k].damage)):
            trial = [*plan[:i], k, *plan[i + 1 :]]
            if total(problem, trial) <= problem.limits[0][1]:
                plan = trial
                break
    assert list(solve(problem, "by-rank", Settings(order=named)).assignment) == plan


def test_order_that_names_no_choice_is_refused_with_the_nearest() -> None:
    problem = Problem((Choice("conv1", (Option("w4", 1.0, (4,)), Option("w8", 0.1, (8,)))),), (("size", 6),))
    with pytest.raises(InvalidRequest, match=r"The order names 'conv', which is not a choice\. Did you mean 'conv1'"):
        solve(problem, "by-rank", Settings(order=["conv"]))


def closed_form(problem: Problem) -> list[int] | None:
    """BAQ by its formula (arXiv 2506.05664), level by level from below; None where even the lowest does not fit."""
    widths, offsets, plan = [], [], None
    for choice in problem.choices:
        bits = np.array([Scheme.parse(option.name).weight.bits for option in choice.options])  # type: ignore[union-attr]
        damage, cost = np.array([o.damage for o in choice.options]), np.array([o.costs[0] for o in choice.options])
        log_c = np.mean(np.log2(damage) + 2 * bits)
        per_bit = (cost.max() - cost.min()) / (bits.max() - bits.min())
        widths.append(bits)
        offsets.append(0.5 * (log_c - np.log2(per_bit)))
    turns = sorted(
        mid - offset
        for bits, offset in zip(widths, offsets, strict=True)
        for mid in (np.sort(bits)[1:] + np.sort(bits)[:-1]) / 2
    )
    for level in [turns[0] - 1, *(np.array(turns[:-1]) + np.array(turns[1:])) / 2, turns[-1] + 1]:
        rounded = [int(np.abs(bits - (level + offset)).argmin()) for bits, offset in zip(widths, offsets, strict=True)]
        if total(problem, rounded) <= problem.limits[0][1]:
            plan = rounded
    return plan


@repeatable(100)
@given(networks(**PLAIN))
def test_baq_rounds_its_closed_form_at_the_highest_level_that_fits(problem: Problem) -> None:
    expected = closed_form(problem)
    if optimum(problem) is None or not can_be_broken(problem) or expected is None:
        return
    assert list(solve(problem, "baq").assignment) == expected


@pytest.mark.parametrize("steps", [(0, 0, 0), (-1, 0, 1), (2, -1, -1), (1, 1, -2)])
def test_baq_is_the_optimum_where_the_closed_form_is_whole_bits(steps: tuple[int, ...]) -> None:
    """c_i / n_i = 16^k makes b_i differ by 2 k whole bits."""
    choices, widths, spent = [], (2, 3, 4, 5, 6, 7, 8), 0
    for i, (step, weights) in enumerate(zip(steps, (100, 300, 700), strict=True)):
        options = [Option(f"w{b}", weights * 4.0 ** (step - b), (weights * b,)) for b in widths]
        choices.append(Choice(f"c{i}", tuple(options)))
        spent += weights * (5 + step)
    problem = Problem(tuple(choices), (("size", spent),))
    found = solve(problem, "baq")
    assert [widths[k] for k in found.assignment] == [5 + step for step in steps]
    best = optimum(problem)
    assert best is not None
    assert math.isclose(found.objective, best, rel_tol=1e-12)


def test_baq_takes_the_widest_where_width_costs_nothing() -> None:
    dear = Choice("weight", (Option("w2", 1.0, (2,)), Option("w8", 0.1, (8,))))
    free = Choice("site", (Option("a4", 1.0, (0,)), Option("a8", 0.1, (0,))))
    assert solve(Problem((dear, free), (("size", 4),)), "baq").assignment == (0, 1)


def test_baq_refuses_options_that_are_no_schemes() -> None:
    problem = Problem((Choice("c", (Option("small", 1.0, (1,)), Option("large", 0.5, (3,)))),), (("size", 2),))
    with pytest.raises(InvalidRequest, match=r"baq reads bits from schemes such as w4a8: "):
        solve(problem, "baq")
