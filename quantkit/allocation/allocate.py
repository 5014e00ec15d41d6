"""From a profile and a budget to a plan: solve, recount, give reasons. Needs no model and no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from quantkit.allocation.execution_problem import choose_execution, needs_execution, separable
from quantkit.allocation.feasibility import OutOfReach
from quantkit.allocation.from_profile import (
    AllocationProblem,
    FixedChoices,
    allocation_problem,
    candidates,
    fixed_cost,
    with_float,
)
from quantkit.allocation.plan_costs import costs_of_execution, counted
from quantkit.allocation.problem import Assignment, Problem
from quantkit.allocation.reasons import explain_latency, reasons
from quantkit.allocation.registry import Settings
from quantkit.allocation.solve import solve
from quantkit.allocation.what_holds import what_holds
from quantkit.budget import Budget
from quantkit.errors import InfeasibleBudget, InvalidRequest, QuantkitError
from quantkit.formats import Scheme
from quantkit.plan import COMPOSITION, FLOAT_STORAGE, TRANSFORMS, Composition, Plan, Profile, average_bits
from quantkit.plan.latency import FULL_BITS

GAP, GAP_OF_LARGE = 1e-6, 1e-4  # relative distance to the bound that counts as optimal
LARGE = 2000  # options: beyond, the last digits of the proof take most of the time
CARRIED = ("first_last", FLOAT_STORAGE, TRANSFORMS)  # of what a profile's provenance says, into that of its plans


def gap_for(problem: Problem) -> float:
    """How near to the bound an assignment has to be to count as the least."""
    return GAP if problem.offsets[-1] <= LARGE else GAP_OF_LARGE


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

    A scheme as budget goes to every layer that was profiled with it; what a rule gave others stays. ``schemes``
    restricts the candidates to some of those profiled; with a limit on latency or activation memory a
    layer may also stay float, unless a rule pins it or ``schemes`` are given. ``order`` names layers for the solver
    "by-rank", the one that deserves the widest format first. Raises InfeasibleBudget with the smallest that can be
    reached in the user's unit, InvalidRequest for a request the profile cannot answer."""
    limit = Budget.parse(budget)
    if limit.scheme is not None:
        profile = _with_scheme(profile, str(limit.scheme), schemes)
    limits = limit.limits(profile)
    wanted = None if schemes is None else [Scheme.parse(s) for s in schemes]

    settings = Settings(seed=seed, gap=GAP, order=order)
    try:
        allocation = _allocation_of(profile, limits, wanted, settings)
        solution = solve(allocation.problem, solver, replace(settings, gap=gap_for(allocation.problem)))
    except OutOfReach as error:
        raise _in_asked_unit(error, limit, profile, wanted) from error

    plan = plan_of(profile, allocation, solution.assignment)
    recount(plan, profile, limits)  # a budget is a postcondition, whatever a solver said
    plan = explain_latency(plan, profile, wanted)
    provenance = {
        "budget": str(limit),
        "limits": limits,
        "solver": solver,
        "objective": solution.objective,
        "bound": solution.bound,
        "gap": solution.gap,
        "proven": solution.proven,
        "separable_damage": allocation.problem.separable_objective(solution.assignment),
        "seed": seed,
        "profile": profile.digest(),
        "target": profile.target,
        **costs_of_execution(plan, profile, limits),
    }
    return replace(plan, provenance=provenance | plan.provenance)


def _with_scheme(profile: Profile, scheme: str, schemes: Iterable[str | Scheme] | None) -> Profile:
    """The profile with one candidate for every layer that may take it. Raises InvalidRequest where none may, and for
    other candidates beside it.
    """
    if schemes is not None:
        raise InvalidRequest(f"The budget {scheme} names the scheme of every layer: leave schemes out.")
    offered = {name: tuple(map(str, options)) for name, options in candidates(profile).items()}
    asked = Scheme.parse(scheme)
    if not any(str(profile.layers[name].carried_out(asked)) in options for name, options in offered.items()):
        candidates(profile, [scheme])  # says what was profiled
    return replace(profile, candidates={n: (scheme,) if scheme in found else found for n, found in offered.items()})


def _allocation_of(
    profile: Profile, limits: Mapping[str, int], schemes: Sequence[Scheme] | None, settings: Settings
) -> AllocationProblem:
    """The problem to solve. Where a limit depends on which layers run on codes, that is decided first, by the sum of
    the damages; what is left are the widths of the weights.
    """
    if not needs_execution(limits):
        return allocation_problem(profile, limits, schemes)
    allowed = with_float(profile, candidates(profile, schemes), schemes)
    if "latency" in limits:
        allowed = timed(allowed)
    fixed = choose_execution(profile, limits, allowed, settings)
    return allocation_problem(profile, separable(limits), schemes, fixed)


def timed(allowed: Mapping[str, Sequence[Scheme]]) -> dict[str, tuple[Scheme, ...]]:
    """The candidates that a latency table has times for: codes of narrower activations are clipped on the way, and
    weights alone are expanded, which saves no time. Raises InvalidRequest where a layer has none, or none but float.
    """
    narrowed = {
        name: tuple(s for s in options if not s.has_codes or (s.activation and s.activation.bits == FULL_BITS))
        for name, options in allowed.items()
    }
    for name, options in narrowed.items():
        if not options or any(s.has_codes for s in allowed[name]) > any(s.has_codes for s in options):
            raise InvalidRequest(
                f"A limit on latency is met with {FULL_BITS}-bit activations so far, and layer {name!r} may be "
                f"{', '.join(map(str, allowed[name]))}. Add a scheme such as 'w4a{FULL_BITS}'."
            )
    return narrowed


def problem_around(profile: Profile, limits: Mapping[str, int], plan: Plan) -> AllocationProblem:
    """The problem in which a plan may be improved: what runs on codes stays where a limit depends on it."""
    fixed = FixedChoices.of(plan) if needs_execution(limits) else None
    return allocation_problem(profile, separable(limits), None, fixed)


def plan_of(profile: Profile, allocation: AllocationProblem, assignment: Assignment) -> Plan:
    """The plan of an assignment, its sizes counted from the formats."""
    chosen, sites = allocation.decode(assignment)
    schemes = {name: chosen.get(name, Scheme()) for name in profile.layers}
    size = sum(layer.weight_bytes(schemes[name]) for name, layer in profile.layers.items())
    return Plan(
        schemes=schemes,
        sites=sites,
        size_bytes=size,
        total_bytes=size + profile.other_bytes,
        average_bits=average_bits(profile.layers, size),
        predicted_damage=profile.predict(chosen, sites),
        why=reasons(profile, allocation, assignment),
        provenance={
            **{key: value for key, value in profile.provenance.items() if key in CARRIED},
            COMPOSITION: str(Composition.of(profile.layers, schemes, profile.other_bytes, profile.float_bytes)),
        },
    )


def recount(plan: Plan, profile: Profile, limits: Mapping[str, int]) -> None:
    """Count the plan itself against the limits; raises QuantkitError where it is over one."""
    for name, limit in limits.items():
        used = counted(profile, plan.schemes, plan.sites, name)
        if used > limit:
            raise QuantkitError(f"The plan uses {used:,} of {limit:,} under the limit {name}. Please report this.")


def _in_asked_unit(
    error: OutOfReach, budget: Budget, profile: Profile, schemes: Iterable[str | Scheme] | None
) -> InfeasibleBudget:
    """The error with the smallest in the unit the user wrote, fixed costs included, as an amount that a budget can
    be asked with."""
    name, least = error.conflict.name, error.conflict.smallest
    if not needs_execution(budget.limits(profile)):
        least += fixed_cost(profile, candidates(profile, schemes), name)
    smallest, unit = budget.in_asked_unit(name, least, profile), budget.unit(name)
    number = f"{smallest:.3f}".rstrip("0").rstrip(".")
    text = f"{number}{unit if unit in ('', '%') else ' ' + unit}"
    others = [f"{key} {value}" for key, value in budget.asked.items() if key in error.conflict.held]
    given = f" while {' and '.join(others)} hold{'s' if len(others) == 1 else ''}" if others else ""
    return InfeasibleBudget(
        f"No plan has {name.replace('_', ' ')} {budget.asked[name]}{given}: the smallest that can be reached is "
        f"{text}. Ask for at least that{what_holds(name, budget.limits(profile)[name], profile, schemes)}",
        f"{name}={budget.asked[name]}",
        smallest,
    )
