"""Every budget at once: the plans that no other one beats in both cost and predicted damage."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from quantkit.allocation.allocate import plan_of
from quantkit.allocation.from_profile import COSTS, question
from quantkit.allocation.lagrangian import pareto_front
from quantkit.errors import InvalidRequest, did_you_mean
from quantkit.formats import Scheme
from quantkit.plan import Plan, Profile


def pareto(
    profile: Profile, *, limit: str = "size", schemes: Iterable[str | Scheme] | None = None
) -> tuple[Plan, ...]:
    """The Pareto front of a profile, cheapest plan first: predicted damage against what ``limit`` counts.

    ``limit``: size, average_bits or bops. ``schemes`` restricts the candidates to some of those profiled. The front
    holds the vertices of the convex hull (a Lagrangian sweep), each improved by swaps; ``allocate`` finds plans
    between them. Raises InvalidRequest for an unknown limit.
    """
    if limit not in COSTS:
        raise InvalidRequest(
            f"A front along {limit!r} is not known; known: {', '.join(COSTS)}.{did_you_mean(limit, list(COSTS))}"
        )
    asked = question(profile, {limit: 0}, schemes)
    plans = []
    for point in pareto_front(asked.problem):
        plan = plan_of(profile, asked, point.assignment)
        provenance = {"front": limit, "profile": profile.digest(), "target": profile.target}
        plans.append(replace(plan, provenance=provenance))
    return tuple(plans)
