"""From a profile and a budget to a plan: solve, recount, give reasons. Needs no model and no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from quantkit.allocation.feasibility import OutOfReach
from quantkit.allocation.from_profile import COSTS, Question, candidates, fixed_cost, question
from quantkit.allocation.problem import Assignment
from quantkit.allocation.reasons import reasons
from quantkit.allocation.registry import Settings
from quantkit.allocation.solve import solve
from quantkit.budget import Budget
from quantkit.errors import InfeasibleBudget, QuantkitError
from quantkit.formats import Scheme
from quantkit.plan import Plan, Profile, average_bits

GAP = 1e-6


def allocate(
    profile: Profile,
    budget: str | Budget | Mapping[str, Any],
    *,
    solver: str = "auto",
    schemes: Iterable[str | Scheme] | None = None,
    order: Sequence[str] = (),
    seed: int = 0,
) -> Plan:
    """The plan with the least predicted damage inside ``budget``; the same arguments give the same plan in any
    process.

    ``schemes`` restricts the candidates to some of those profiled; ``order`` names layers for the solver "by-rank",
    the one that deserves the widest format first. Raises InfeasibleBudget with the smallest that can be reached in the
    user's unit, InvalidRequest for a request the profile cannot answer."""
    limit = Budget.parse(budget)
    limits = limit.limits(profile)
    asked = question(profile, limits, schemes)
    try:
        solution = solve(asked.problem, solver, Settings(seed=seed, gap=GAP, order=order))
    except OutOfReach as error:
        raise _in_asked_unit(error, limit, profile, schemes) from error
    plan = plan_of(profile, asked, solution.assignment)
    recount(plan, profile, limits)
    provenance = {
        "budget": str(limit),
        "limits": limits,
        "solver": solver,
        "objective": solution.objective,
        "bound": solution.bound,
        "gap": solution.gap,
        "proven": solution.proven,
        "separable_damage": asked.problem.separable_objective(solution.assignment),
        "seed": seed,
        "profile": profile.digest(),
        "target": profile.target,
    }
    return Plan(**{**vars(plan), "provenance": provenance})


def plan_of(profile: Profile, asked: Question, assignment: Assignment) -> Plan:
    """The plan of an assignment, its sizes counted from the formats."""
    chosen, sites = asked.answer(assignment)
    schemes = {name: chosen.get(name, Scheme()) for name in profile.layers}
    size = sum(layer.weight_bytes(schemes[name]) for name, layer in profile.layers.items())
    return Plan(
        schemes=schemes,
        sites=sites,
        size_bytes=size,
        total_bytes=size + profile.other_bytes,
        average_bits=average_bits(profile.layers, size),
        predicted_damage=profile.predict(chosen, sites),
        why=reasons(profile, asked, assignment),
    )


def recount(plan: Plan, profile: Profile, limits: Mapping[str, int]) -> None:
    """Count the plan itself against the limits: a budget is a postcondition, whatever a solver said."""
    for name, limit in limits.items():
        used = sum(COSTS[name](layer, plan.schemes[layer.name]) for layer in profile.layers.values())
        used += profile.other_bytes if name == "size" else 0
        if used > limit:
            raise QuantkitError(f"The plan uses {used:,} of {limit:,} under the limit {name}. Please report this.")


def _in_asked_unit(
    error: OutOfReach, budget: Budget, profile: Profile, schemes: Iterable[str | Scheme] | None
) -> InfeasibleBudget:
    """The error with the smallest in the unit the user wrote, fixed costs included, as an amount that a budget can
    be asked with."""
    name, least = error.conflict.name, error.conflict.smallest
    least += fixed_cost(profile, candidates(profile, schemes), name)
    smallest, unit = budget.in_asked_unit(name, least, profile), budget.unit(name)
    number = f"{smallest:.3f}".rstrip("0").rstrip(".")
    text = f"{number}{unit if unit in ('', '%') else ' ' + unit}"
    others = [f"{key} {value}" for key, value in budget.asked.items() if key in error.conflict.held]
    given = f" while {' and '.join(others)} hold{'s' if len(others) == 1 else ''}" if others else ""
    return InfeasibleBudget(
        f"No plan has {name.replace('_', ' ')} {budget.asked[name]}{given}: the smallest that can be reached is "
        f"{text}. Ask for at least that, or profile narrower schemes.",
        f"{name}={budget.asked[name]}",
        smallest,
    )
