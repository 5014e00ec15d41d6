"""Problems: what is malformed is refused in words, the reduced form means the same, solvers that give up say so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given

from quantkit.allocation import dynamic_program, separable
from quantkit.allocation.feasibility import OutOfReach
from quantkit.allocation.presolve import connected, presolve
from quantkit.allocation.problem import Choice, Option, Problem, SolverResult
from quantkit.allocation.registry import SOLVERS, NoAssignment, Settings, SolverGaveUp
from quantkit.allocation.solve import solve
from quantkit.errors import InvalidRequest
from tests.allocation.helpers import everything, random_problem
from tests.allocation.strategies import awkward_problems, networks, repeatable

TWO = (Option("w4", 1.0, (4,)), Option("w8", 0.1, (8,)))
SIZE = (("size", 10),)

MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "one name twice": ({"choices": (Choice("a", TWO), Choice("a", TWO)), "limits": SIZE}, "Two choices have one name"),
    "unknown member": (
        {"choices": (Choice("a", TWO),), "limits": SIZE, "same": (("a", "b"),)},
        "A group names 'b', which is not a choice",
    ),
    "no option": ({"choices": (Choice("a", ()),)}, "The choice 'a' has no option"),
    "one option twice": (
        {"choices": (Choice("a", (TWO[0], TWO[0])),), "limits": SIZE},
        "The choice 'a' has one option twice",
    ),
    "missing cost": ({"choices": (Choice("a", TWO),)}, r"Option 'w4' of 'a' needs 0 costs, .* got \(4,\)"),
    "negative cost": (
        {"choices": (Choice("a", (Option("w4", 1.0, (-1,)),)),), "limits": SIZE},
        r"integers of at least 0; got \(-1,\)",
    ),
    "cost that is no integer": (
        {"choices": (Choice("a", (Option("w4", 1.0, (1.5,)),)),), "limits": SIZE},  # type: ignore[arg-type]
        r"integers of at least 0; got \(1.5,\)",
    ),
    "damage that is no number": (
        {"choices": (Choice("a", (Option("w4", float("nan"), (4,)),)),), "limits": SIZE},
        "Option 'w4' of 'a' has damage nan: measure it again",
    ),
    "costs beyond integers": (
        {"choices": (Choice("a", (Option("w4", 1.0, (2**63,)),)),), "limits": SIZE},
        r"Costs under the limit 'size' add up beyond 2\*\*62: count in a larger unit",
    ),
    "pair terms of another shape": (
        {"choices": (Choice("a", TWO),), "limits": SIZE, "pairs": np.eye(3)},
        r"The pair terms are \(3, 3\), for 2 options they must be \(2, 2\)",
    ),
    "pair terms that are not symmetric": (
        {"choices": (Choice("a", TWO),), "limits": SIZE, "pairs": np.array([[1.0, 0.5], [0.0, 1.0]])},
        "The pair terms must be finite and symmetric: measure the profile again",
    ),
    "infinite pair terms": (
        {"choices": (Choice("a", TWO),), "limits": SIZE, "pairs": np.full((2, 2), np.inf)},
        "The pair terms must be finite and symmetric",
    ),
}


@pytest.mark.parametrize(("parts", "message"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_problem_is_refused_in_words(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Problem(**parts)


@pytest.mark.parametrize(
    ("group", "message"),
    [("same", "'a', 'b' must take the same option, but no option"), ("agree", "'a', 'b' must agree on one format")],
)
def test_group_with_nothing_in_common_is_named(group: str, message: str) -> None:
    choices = (Choice("a", (Option("w4", 1.0, (), "a4"),)), Choice("b", (Option("w8", 1.0, (), "a8"),)))
    with pytest.raises(InvalidRequest, match=message):
        solve(Problem(choices, **{group: (("a", "b"),)}))


@repeatable(100)
@given(awkward_problems(limits=(0, 3)))
def test_reduced_problem_has_the_same_assignments_costs_and_damages(problem: Problem) -> None:
    """But only limits that can be broken; and groups are gone, or disjoint."""
    asked = everything(problem)
    if not len(asked.options):
        with pytest.raises(InvalidRequest):
            presolve(problem)
        return
    reduced = presolve(problem)
    listed = everything(reduced.problem)
    expanded = [reduced.expand(options.tolist()) for options in listed.options]
    assert sorted(expanded) == sorted(map(tuple, asked.options.tolist()))
    names = [name for name, _ in problem.limits]
    for options, costs, assignment in zip(listed.options, listed.costs, expanded, strict=True):
        whole = dict(zip(names, problem.cost(assignment), strict=True))
        for k, (name, limit) in enumerate(reduced.problem.limits):
            assert reduced.asked_cost(k, int(costs[k])) == whole[name]
            assert (costs[k] <= limit) == (whole[name] <= dict(problem.limits)[name])
        damage = reduced.problem.separable_objective(options.tolist())
        assert damage == pytest.approx(problem.separable_objective(assignment))
    kept = {name for name, _ in reduced.problem.limits}
    for name, limit in problem.limits:
        assert name in kept or max(asked.costs[:, names.index(name)]) <= limit
    members = [name for group in reduced.problem.agree for name in group]
    assert len(members) == len(set(members)) and not reduced.problem.same


@repeatable(60)
@given(networks(pairs=True))
def test_reduced_problem_has_the_same_objective_with_pair_terms(problem: Problem) -> None:
    reduced = presolve(problem)
    listed = everything(reduced.problem)
    wanted = [problem.objective(reduced.expand(options.tolist())) for options in listed.options]
    assert listed.objectives.tolist() == pytest.approx(wanted, abs=1e-12 * float(np.abs(problem.pairs).max()))


def test_connected_joins_groups_that_share_a_member() -> None:
    assert connected("abcde", [("d", "b"), ("b", "e")]) == [("a",), ("b", "d", "e"), ("c",)]


def test_totals_beyond_the_precision_of_floats_are_counted_exactly() -> None:
    """One unit over the limit, where a float cannot tell."""
    big = 2**55
    choices = tuple(Choice(f"c{i}", (Option("w4", 1.0, (big,)), Option("w8", 0.1, (2 * big + 1,)))) for i in range(2))
    for room, expected in ((0, 1.1), (-1, 2.0)):
        problem = Problem(choices, (("size", 3 * big + 1 + room),))
        for name in ("pulp", "highs", "dp", "auto"):
            found = solve(problem, name)
            assert found.objective == pytest.approx(expected), name
            assert sum(choices[i].options[k].costs[0] for i, k in enumerate(found.assignment)) <= 3 * big + 1 + room


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_problem_without_choices_has_the_empty_answer(name: str) -> None:
    found = solve(Problem((), (("size", 0),)), name)
    assert (found.assignment, found.objective, found.gap, found.proven) == ((), 0.0, 0.0, True)
    with pytest.raises(OutOfReach, match="The limit size = -5 cannot be met: the smallest is 0"):
        solve(Problem((), (("size", -5),)), name)


def test_dynamic_program_gives_up_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    two = random_problem(np.random.default_rng(4), limits=(2, 2), choices=(5, 5), options=(4, 4), groups=False)
    with pytest.raises(SolverGaveUp, match=r"takes one limit, this plan has limit0, limit1\. Try solver='highs'"):
        solve(two, "dp")
    monkeypatch.setattr(dynamic_program, "_MOST_STATES", 1)
    one = random_problem(np.random.default_rng(3), limits=(1, 1), choices=(6, 6), options=(5, 5), groups=False)
    with pytest.raises(SolverGaveUp, match=r"would keep over 1 totals\. Try solver='highs'"):
        solve(one, "dp")


def test_next_solver_is_asked_when_one_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refusing(name: str, kind: type[Exception]) -> Any:
        def refuse(problem: Problem, settings: Settings) -> SolverResult:
            asked.append(name)
            raise kind(name)

        return refuse

    problem = random_problem(np.random.default_rng(3), limits=(1, 1), choices=(5, 5), options=(4, 4), groups=False)
    best = solve(problem, "auto").objective
    monkeypatch.setattr(separable, "pulp_cbc", refusing("pulp", SolverGaveUp))
    monkeypatch.setattr(separable, "highs", refusing("highs", NoAssignment))
    assert solve(problem, "auto").objective == pytest.approx(best)
    assert asked == ["pulp", "highs"]
    monkeypatch.setattr(separable, "dp", refusing("dp", SolverGaveUp))
    with pytest.raises(SolverGaveUp, match="found no assignment, but there is one"):
        solve(problem, "auto")


def test_node_limit_without_an_answer_is_no_proof_of_infeasibility() -> None:
    """A solver stopped before it found anything says that it gave up, or finds a plan within the limits."""
    problem = random_problem(np.random.default_rng(8), choices=(60, 60), options=(5, 5), limits=(3, 3), groups=False)
    for name in ("highs", "pulp"):
        try:
            found = solve(problem, name, Settings(nodes=1))
        except SolverGaveUp as refusal:
            assert "Try solver=" in str(refusal)
            continue
        assert problem.feasible(found.assignment)
        assert found.bound <= found.objective
