"""Both integer programs, the dynamic program and brute force agree; nothing is over a limit; a limit out of reach is
named with the least that can be asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given

from quantkit.allocation.feasibility import OutOfReach
from quantkit.allocation.problem import Choice, Option, Problem, Solution
from quantkit.allocation.solve import solve
from quantkit.errors import InvalidRequest
from tests.allocation.helpers import everything, optimum, smallest
from tests.allocation.strategies import awkward_problems, networks, repeatable

PRECISION = 1e-9  # of the largest damage: what a solver in floating point can be asked for


def solved_by_all(problem: Problem) -> list[Solution]:
    """What every exact solver that takes the problem finds."""
    names = ["pulp", "highs"] + ["dp"] * (len(problem.limits) <= 1)
    return [solve(problem, name) for name in names]


def assert_all_find_the_optimum(problem: Problem) -> None:
    best = optimum(problem)
    if best is None:
        assert_all_refuse(problem)
        return
    rounding = PRECISION * max(abs(o.damage) for choice in problem.choices for o in choice.options)
    limits = [limit for _, limit in problem.limits]
    for found in solved_by_all(problem):
        taken = [choice.options[k] for choice, k in zip(problem.choices, found.assignment, strict=True)]
        assert all(sum(o.costs[k] for o in taken) <= limit for k, limit in enumerate(limits)), found.solver
        assert found.objective == pytest.approx(sum(o.damage for o in taken), abs=rounding)
        assert best - rounding <= found.objective <= best + rounding, found.solver
        assert found.bound <= best + rounding


def assert_all_refuse(problem: Problem) -> None:
    """No assignment: the groups contradict each other, or the limit that is blamed cannot be met by brute force."""
    contradiction = not len(everything(problem).options)
    for name in ("pulp", "highs", "dp"):
        if name == "dp" and len(problem.limits) > 1 and not contradiction:
            continue
        with pytest.raises(InvalidRequest if contradiction else OutOfReach) as caught:
            solve(problem, name)
        if not contradiction:
            assert_blame_is_right(problem, caught.value)


def assert_blame_is_right(problem: Problem, error: OutOfReach) -> None:
    blamed, held = error.conflict.name, error.conflict.held
    asked = dict(problem.limits)[blamed]
    # A limit that holds whatever is chosen is not worth mentioning, and changes nothing here.
    assert smallest(problem, blamed, held) == error.smallest > asked
    assert error.limit == blamed not in held
    assert f"{blamed} = {asked:,} cannot be met" in str(error)
    assert f"the smallest is {error.smallest:,}." in str(error)
    eased = replace(
        problem,
        limits=tuple((name, error.smallest if name == blamed else limit) for name, limit in problem.limits),
    )
    if len(held) == len(problem.limits) - 1:
        assert eased.within_limits(solve(eased).assignment)


@pytest.mark.slow
@repeatable(200)
@given(networks(limits=(1, 3)))
def test_solvers_and_brute_force_agree_on_networks(problem: Problem) -> None:
    assert_all_find_the_optimum(problem)


@pytest.mark.slow
@repeatable(120)
@given(awkward_problems(limits=(0, 4)))
def test_solvers_and_brute_force_agree_on_awkward_problems(problem: Problem) -> None:
    assert_all_find_the_optimum(problem)


def problem_of(choices: list[list[tuple[float, tuple[int, ...]]]], limits: tuple[int, ...]) -> Problem:
    """From (damage, costs) of every option of every choice."""
    return Problem(
        tuple(
            Choice(f"c{i}", tuple(Option(f"o{k}", damage, costs) for k, (damage, costs) in enumerate(options)))
            for i, options in enumerate(choices)
        ),
        tuple((f"limit{k}", limit) for k, limit in enumerate(limits)),
    )


def test_preprocessing_of_cbc_is_not_trusted() -> None:
    """With it CBC 2.10.3 calls the objective 0.42 optimal."""
    wide = [(9.3e-4, (0, 0)), (2.4e-4, (7966, 15)), (6.8e-5, (15931, 50)), (3e-6, (31863, 113)), (7e-8, (47794, 239))]
    deep = [(0.4226, (0, 0)), (0.151, (141, 11)), (0.0024, (565, 33))]
    problem = problem_of([wide, deep], (26952, 20))
    assert_all_find_the_optimum(problem)
    assert solve(problem, "pulp").assignment == (0, 1)


def test_crash_of_cbc_is_told_from_an_answer() -> None:
    """Without its preprocessing CBC 2.10.3 crashes on this program, which has no solution."""
    short = [(1e4, (0, 57108, 0)), (0.0, (0, 0, 104267))]
    long = [
        (5875.8, (0, 10594, 18167)),
        (6065.9, (0, 0, 0)),
        (992.8, (26, 5653, 19448)),
        (831.9, (26, 19689, 3973)),
        (0.0, (79, 27229, 20653)),
        (12.8, (79, 35196, 74034)),
    ]
    assert_all_refuse(problem_of([short, long], (12, 10330, 88809)))
