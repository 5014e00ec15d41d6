"""A limit on the accuracy drop: the cheapest plan of the profile's front whose evaluated metric is good enough.

Plans are evaluated with the codes the profile was measured with; the chosen one is then applied, which rounds again,
and what is returned was itself evaluated after that. ``evaluate`` is asked often: it must not use the calibration
data, and the metric of the returned plan on the data it was chosen by is optimistic.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

from quantkit.allocation.allocate import allocate
from quantkit.allocation.bisection import Evaluation, Judge, along_front
from quantkit.allocation.from_profile import COSTS
from quantkit.allocation.front import pareto
from quantkit.budget import Budget
from quantkit.errors import AccuracyNotMet, InvalidRequest
from quantkit.kernels.reference import QuantizedWeight, SiteRange
from quantkit.pipeline.profile import Bench
from quantkit.pipeline.request import Request
from quantkit.pipeline.result import Result
from quantkit.plan import Plan, Profile
from quantkit.progress import notice
from quantkit.quantizers.simulate import SimulatedModel

Metric = Callable[[nn.Module], float]


def require_accuracy_request(limit: Budget, evaluate: Metric | None, inplace: bool) -> None:
    """Raise InvalidRequest for a limit on accuracy that cannot be met: nothing to evaluate, nothing to make small, or
    no copies of the model to try plans on.
    """
    if limit.accuracy_drop is None and limit.minimize is None:
        return
    if limit.accuracy_drop is None:
        raise InvalidRequest(f"minimize={limit.minimize} goes with a limit on accuracy: add accuracy_drop.")
    if evaluate is None:
        raise InvalidRequest(
            f"accuracy_drop={limit.accuracy_drop} needs evaluate, a function model -> number, higher is better."
        )
    if inplace:
        raise InvalidRequest(
            "accuracy_drop tries several plans, and inplace=True leaves one model. Leave inplace out."
        )
    if limit.minimize not in (None, *COSTS):
        raise InvalidRequest(f"minimize={limit.minimize} is not supported yet; supported: {', '.join(COSTS)}.")


def meet_accuracy(
    request: Request,
    profile: Profile,
    bench: Bench,
    limit: Budget,
    evaluate: Metric,
    finish: Callable[[Plan], Result],
) -> Result:
    """The applied result of the cheapest plan found that meets the limit, all other limits included.

    ``finish`` applies a plan and evaluates it. Raises AccuracyNotMet with the best plan and the measured (cost, drop)
    points when none does, InfeasibleBudget when the other limits alone cannot be met.
    """
    reference = evaluate(request.ready.model)
    front = _front(profile, limit)
    judge = Judge(
        lambda plan: evaluate(_simulated(request, bench, profile, plan)),
        reference,
        limit.allowed_drop(reference),
        lambda plan: _cost(profile, plan, limit.minimize or "size"),
    )
    found = along_front(front, judge)
    dearer = [] if found is None else [plan for plan in front if judge.cost(plan) >= found.cost]
    for plan in dearer:
        result = finish(plan)
        drop = result.metrics["float"] - result.metrics["quantized"]
        notice(f"plan of {judge.cost(plan):,.6g}: drop {drop:.4g} of {judge.allowed:.4g} allowed")
        if drop <= judge.allowed:
            result.metrics["evaluations"] = float(len(judge.seen))
            result.curve = judge.curve
            return result
        judge.seen[plan.digest()] = Evaluation(plan, judge.cost(plan), drop, float("nan"))
    raise _not_met(limit, judge)


def _not_met(limit: Budget, judge: Judge) -> AccuracyNotMet:
    best = min(judge.seen.values(), key=lambda one: one.drop)
    points = ", ".join(f"{drop:.4g} at {cost:,.0f}" for cost, drop in judge.curve)
    return AccuracyNotMet(
        f"No plan keeps the drop within {limit.accuracy_drop}: the least found is {best.drop:.4g}, with "
        f"{best.plan.average_bits:.3f} bits on average. Allow that drop, profile wider schemes, or keep layers float. "
        f"Measured drop at {limit.minimize or 'size'}: {points}.",
        best.plan,
        judge.curve,
    )


def _front(profile: Profile, limit: Budget) -> list[Plan]:
    """The plans to choose from, cheapest first: the front, as far as the other limits allow, and their best plan."""
    plans = list(pareto(profile, limit=limit.minimize or "size"))
    others = limit.without_accuracy()
    if others is not None:
        limits = others.limits(profile)
        plans = [plan for plan in plans if all(_cost(profile, plan, name) <= most for name, most in limits.items())]
        plans.append(allocate(profile, others))
    distinct = {plan.digest(): plan for plan in plans}
    return sorted(distinct.values(), key=lambda plan: _cost(profile, plan, limit.minimize or "size"))


def _cost(profile: Profile, plan: Plan, name: str) -> int:
    """What ``name`` counts of a plan, as ``Budget.limits`` does."""
    used = sum(COSTS[name](layer, plan.schemes[layer.name]) for layer in profile.layers.values())
    return used + (profile.other_bytes if name == "size" else 0)


def _simulated(request: Request, bench: Bench, profile: Profile, plan: Plan) -> SimulatedModel:
    """A copy of the model with the plan's formats, in the codes and ranges the profile was measured with."""
    chosen = [bench.perturbations[k] for k in profile.chosen(plan.schemes, plan.sites)]
    weights = {p.owner: p.change for p in chosen if isinstance(p.change, QuantizedWeight)}
    ranges = {p.owner: p.change for p in chosen if isinstance(p.change, SiteRange)}
    return SimulatedModel(copy.deepcopy(request.ready.model), request.ready.sites, weights, ranges)
