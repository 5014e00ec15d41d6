"""Methods of others, by name: uniform, greedy and by rank do what their definitions say, and keep every limit or give
up."""

from __future__ import annotations

import pytest
from hypothesis import given

from quantkit.allocation.problem import Choice, Option, Problem
from quantkit.allocation.registry import Settings, SolverGaveUp
from quantkit.allocation.solve import solve
from quantkit.errors import InvalidRequest
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
@pytest.mark.parametrize("name", ["uniform", "greedy", "by-rank"])
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


@pytest.mark.parametrize("name", ["baq", "lagrangian", "quadratic"])
def test_a_solver_that_was_removed_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"Unknown solver '{name}'; known: (highs|pulp|dp|auto)\b.*\bgreedy"):
        solve(Problem(()), name)
