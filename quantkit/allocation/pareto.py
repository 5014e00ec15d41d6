"""Every budget at once: the plans that no other beats in both cost and predicted damage."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from quantkit.allocation.allocate import allocate, plan_of, timed
from quantkit.allocation.execution_problem import smallest
from quantkit.allocation.from_profile import allocation_problem, candidates, with_float
from quantkit.allocation.pareto_front import pareto_front
from quantkit.allocation.plan_costs import COUNTED, OF_EXECUTION, counted
from quantkit.allocation.registry import Settings
from quantkit.budget import Budget
from quantkit.errors import InvalidRequest, did_you_mean
from quantkit.formats import Scheme
from quantkit.plan import Plan, Profile

STEPS = 12


def pareto(
    profile: Profile, *, limit: str = "size", schemes: Iterable[str | Scheme] | None = None
) -> tuple[Plan, ...]:
    """The Pareto front of a profile, cheapest plan first: predicted damage against what ``limit`` counts.

    ``limit``: size, average_bits, bops, latency or activation_bytes. ``schemes`` restricts the candidates to some of
    those profiled. The front holds the vertices of the convex hull (a Lagrangian sweep), each improved by swaps;
    ``allocate`` finds plans between them. Latency and activation memory are no sums over layers: their fronts are the
    best plans at even steps from the smallest that can be reached to that of the float model. Raises InvalidRequest
    for an unknown limit.
    """
    if limit not in COUNTED:
        raise InvalidRequest(
            f"A front along {limit!r} is not known; known: {', '.join(COUNTED)}.{did_you_mean(limit, list(COUNTED))}"
        )
    if limit in OF_EXECUTION:
        return _by_steps(profile, limit, schemes)
    if limit == "bops":
        Budget.parse("bops=1").limits(profile)  # refuses where the profile has no multiplications
    allocation = allocation_problem(profile, {limit: 0}, schemes)
    plans = []
    for point in pareto_front(allocation.problem):
        plan = plan_of(profile, allocation, point.assignment)
        provenance = {"front": limit, "profile": profile.digest(), "target": profile.target}
        plans.append(replace(plan, provenance=provenance | plan.provenance))
    return tuple(plans)


def _by_steps(profile: Profile, limit: str, schemes: Iterable[str | Scheme] | None) -> tuple[Plan, ...]:
    unit = "ns" if limit == "latency" else "B"
    Budget.parse(f"{limit}=1 {unit}").limits(profile)  # refuses where the profile has no costs
    wanted = None if schemes is None else [Scheme.parse(s) for s in schemes]
    allowed = with_float(profile, candidates(profile, wanted), wanted)
    if limit == "latency":
        allowed = timed(allowed)
    least = smallest(profile, limit, {}, allowed, Settings())
    most = counted(profile, dict.fromkeys(profile.layers, Scheme()), {}, limit)
    assert least is not None, "no other limit holds"
    if not most and not least:
        raise InvalidRequest(f"There is no front along {limit}: no activation of this profile can be quantized.")
    amounts = {least + (most - least) * k // STEPS for k in range(STEPS + 1)} if most > least else {least}
    plans = [allocate(profile, f"{limit}={amount} {unit}", schemes=wanted) for amount in sorted(amounts) if amount]
    kept: dict[str, Plan] = {}
    for plan in plans:
        if not kept or (plan.predicted_damage or 0) < min(p.predicted_damage or 0 for p in kept.values()):
            kept[plan.digest()] = replace(plan, provenance=plan.provenance | {"front": limit})
    return tuple(kept.values())
