"""A limit on the accuracy drop: the cheapest plan of the profile's front whose evaluated metric is good enough.

Plans are first evaluated with the codes the profile was measured with, which takes seconds. The best of them is
applied, and since learning makes up for damage, so are a few cheaper ones: what is returned was itself evaluated after
that. ``evaluate`` is asked often: it must not use the calibration data, and the metric of the returned plan on the
data it was chosen by is optimistic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from quantkit.allocation.accuracy_search import (
    AccuracyGate,
    Evaluation,
    Metric,
    along_front,
    between,
    by_levels,
    drop_of,
    first_that_meets,
    rising,
)
from quantkit.allocation.allocate import allocate, plan_of
from quantkit.allocation.from_profile import FLOAT_BITS, allocation_problem, assignment_of, candidates
from quantkit.allocation.pareto import pareto
from quantkit.allocation.plan_costs import counted
from quantkit.allocation.presolve import presolve
from quantkit.allocation.problem import Problem
from quantkit.budget import Budget
from quantkit.errors import AccuracyNotMet, InvalidRequest
from quantkit.formats import Scheme
from quantkit.plan import Plan, Profile
from quantkit.progress import notice
from quantkit.sensitivity.augmented import augmented_scores
from quantkit.sensitivity.measure import Scores, swapped_weights
from quantkit.simulation.model import SimulatedModel
from quantkit.simulation.quantized import QuantizedModel
from quantkit.stages.metric import Evaluate, outcome_of
from quantkit.stages.profile import Evaluator
from quantkit.stages.request import Request
from quantkit.stages.result import Result

TRIES = 6  # plans evaluated between two points of the front
APPLIED_TRIES = {"fast": 2, "balanced": 4, "thorough": 6}  # plans applied below the first that met the limit
APART = 0.01  # of their cost, between plans that are applied: less is not worth minutes


def require_accuracy_request(limit: Budget, evaluate: Evaluate | None, inplace: bool) -> None:
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


@dataclass(frozen=True)
class AccuracySearch:
    """What a plan that keeps the accuracy is looked for by."""

    request: Request
    profile: Profile
    evaluator: Evaluator
    limit: Budget
    evaluate: Evaluate | None
    effort: str


@dataclass(frozen=True)
class Finish:
    """What applies a plan to a copy of the model, which is not evaluated yet. ``learning``: the same with learning,
    None where there is nothing to learn from, or the user decided.
    """

    plain: Callable[[Plan], Result]
    learning: Callable[[Plan], Result] | None = None


def meet_accuracy(search: AccuracySearch, finish: Finish) -> Result:
    """The applied result of the cheapest plan found that meets the limit, all other limits included.

    Plans are looked for on the front and between its points, with the profile's codes; from ``effort`` "balanced" on
    also level by level, about log2(layers) evaluations for each width. ``finish`` applies a plan. What is learned
    then buys accuracy, so cheaper plans are applied too, ``APPLIED_TRIES`` of them by bisection on the cost. Raises
    AccuracyNotMet with the best result and the measured (cost, drop) points when no plan meets the limit,
    InfeasibleBudget when the other limits alone cannot be met.
    """
    request, profile, evaluator, limit = search.request, search.profile, search.evaluator, search.limit
    evaluate, effort = search.evaluate, search.effort
    assert evaluate is not None, "checked before"
    reference = outcome_of(evaluate, QuantizedModel.of(request.ready.float_model()))
    front = _front(profile, limit)
    plan_at = partial(_plan_at, profile, limit)
    gate = AccuracyGate(
        partial(_cursory, search, evaluate),
        reference,
        limit.allowed_drop(float(np.mean(reference))),
        lambda plan: _cost(profile, plan, limit.minimize or "size"),
        bool(limit.confident),
        lambda plan: _within(profile, plan, limit),
    )
    if along_front(front, gate) is not None:
        between(gate, plan_at, TRIES)
        if effort != "fast":
            _by_levels(profile, evaluator, gate)
    applied = Applied(gate, finish, evaluate)
    if not any(first_that_meets(plans, applied.gate) for plans in rising(gate, front, APART)):
        return applied.learned(limit)
    found = between(applied.gate, plan_at, APPLIED_TRIES[effort], least=gate.cost(front[0]), apart=APART)
    assert found is not None, "one was found to meet the limit"
    return applied.result_of(found)


def accurate_enough(request: Request, plan: Plan, limit: Budget, evaluate: Evaluate, finish: Finish) -> Result:
    """The applied result of the only plan there is. Raises AccuracyNotMet where it loses more than the limit."""
    reference = outcome_of(evaluate, QuantizedModel.of(request.ready.float_model()))
    blank = request.unmeasured()
    gate = AccuracyGate(
        lambda plan: outcome_of(evaluate, finish.plain(plan).model),
        reference,
        limit.allowed_drop(float(np.mean(reference))),
        lambda plan: _cost(blank, plan, "size"),
        bool(limit.confident),
    )
    applied = Applied(gate, finish, evaluate)
    return applied.result_of(applied.gate.look(plan)) if applied.gate.meets(plan) else applied.learned(limit)


class Applied:
    """Plans evaluated once they are applied: minutes each, so few of them; of the models only the best and the last
    are kept.
    """

    def __init__(self, cursory: AccuracyGate, finish: Finish, evaluate: Evaluate) -> None:
        self.cursory, self.finish, self.evaluate = cursory, finish, evaluate
        self.gate = replace(cursory, evaluate=self._outcome, seen={})
        self.results: dict[str, tuple[Result, float]] = {}  # with the metric

    def _outcome(self, plan: Plan) -> Metric:
        best = self.gate.cheapest() or self.gate.least_drop()
        self.results = {} if best is None else {best.plan.digest(): self.results[best.plan.digest()]}
        result = self.finish.plain(plan)
        outcome = outcome_of(self.evaluate, result.model)
        self.results[plan.digest()] = result, float(np.mean(outcome))
        drop, _ = drop_of(self.gate.reference, outcome)
        notice(f"plan of {self.gate.cost(plan):,.6g}: drop {drop:.4g} of {self.gate.allowed:.4g} allowed")
        return outcome

    def learned(self, limit: Budget) -> Result:
        """The result of the plan that loses least, learned where its formats are so wide that this was not thought
        worth the time. Raises AccuracyNotMet, with the better of both, where that does not meet the limit either.
        """
        best = self.gate.least_drop()
        assert best is not None, "one was applied"
        key = best.plan.digest()
        if self.finish.learning is not None and "reconstruction" not in self.results[key][0].notes:
            notice(f"the least drop is {best.drop:.4g} of {self.gate.allowed:.4g} allowed: learning at these formats")
            result = self.finish.learning(best.plan)
            outcome = outcome_of(self.evaluate, result.model)
            drop, bound = drop_of(self.gate.reference, outcome)
            if drop < best.drop:
                best = self.gate.seen[key] = replace(best, drop=drop, bound=bound)
                self.results[key] = result, float(np.mean(outcome))
        if not self.gate.accepts(best):
            raise _not_met(limit, self)
        return self.result_of(best)

    def result_of(self, found: Evaluation) -> Result:
        """A plan's result with its metrics and those of the float model."""
        result, metric = self.results[found.plan.digest()]
        metrics = {"float": float(np.mean(self.gate.reference)), "quantized": metric}
        metrics |= {} if math.isnan(found.bound) else {"drop_bound": found.bound}
        metrics["evaluations"] = float(len(self.everything().seen))
        return replace(result, metrics=result.metrics | metrics, curve=self.gate.curve)

    def everything(self) -> AccuracyGate:
        """All that was evaluated, with the profile's codes where a plan was not applied."""
        return replace(self.gate, seen=self.cursory.seen | self.gate.seen)


def _plan_at(profile: Profile, limit: Budget, cost: float) -> Plan:
    """The plan that is predicted to be best at a cost, the other limits included."""
    name = limit.minimize or "size"
    tightest = int(min(cost, _other_limits(profile, limit, name)[name]))
    return allocate(profile, limit.at_most(name, tightest, profile))


def _other_limits(profile: Profile, limit: Budget, *names: str) -> dict[str, float]:
    """The limits beside that on accuracy; infinite for those of ``names`` that the budget does not set."""
    others, free = limit.without_accuracy(), dict.fromkeys(names, math.inf)
    return free if others is None else free | others.limits(profile)


def _within(profile: Profile, plan: Plan, limit: Budget) -> bool:
    return all(_cost(profile, plan, name) <= most for name, most in _other_limits(profile, limit).items())


def _by_levels(profile: Profile, evaluator: Evaluator, gate: AccuracyGate) -> None:
    """Bisection per width, in ascending order of the augmented scores."""
    scores = augmented_scores(
        evaluator.perturbations, Scores(profile.damage, np.zeros(len(profile.damage)), profile.gram)
    )
    asked = allocation_problem(profile, {"size": 0})
    kept = _agreeing(asked.problem)
    possible = {n: [s for s in found if (n, str(s)) in kept] for n, found in candidates(profile).items()}
    wide = {name: _widest_first(schemes) for name, schemes in possible.items()}
    widths = sorted({s.weight.bits for found in wide.values() for s in found if s.weight}, reverse=True)
    levels = [{name: _at_width(found, width) for name, found in wide.items()} for width in widths]

    def plan_of_schemes(schemes: Mapping[str, Scheme]) -> Plan:
        plan = Plan(schemes=dict(schemes), sites=profile.site_formats(schemes))
        return plan_of(profile, asked, assignment_of(profile, asked, plan))

    by_levels(sorted(scores, key=scores.__getitem__), levels, plan_of_schemes, gate)


def _agreeing(problem: Problem) -> set[tuple[str, str]]:
    """(choice, option) by name of what can be taken together: readers of one tensor agree on its format."""
    origins = (origin for options in presolve(problem).back for option in options for origin in option)
    return {(problem.choices[i].name, problem.choices[i].options[k].name) for i, k in origins}


def _widest_first(schemes: Sequence[Scheme]) -> list[Scheme]:
    """A layer's quantized schemes with the widest activations among them, most weight bits first. Float16 weights read
    any.
    """
    quantized = [s for s in schemes if s.weight is not None]
    read = {s: s.activation.bits if s.activation else FLOAT_BITS for s in quantized if s.has_codes}
    widest = max(read.values(), default=FLOAT_BITS)
    kept = [s for s in quantized if read.get(s, widest) == widest]
    return sorted(kept, key=lambda s: s.weight.bits if s.weight else FLOAT_BITS, reverse=True) or list(schemes)


def _at_width(schemes: Sequence[Scheme], width: int) -> Scheme:
    """The widest of a layer's schemes (widest first) that is no wider, else its narrowest."""
    return next((s for s in schemes if s.weight is not None and s.weight.bits <= width), schemes[-1])


def _not_met(limit: Budget, applied: Applied) -> AccuracyNotMet:
    best, gate = applied.gate.least_drop(), applied.everything()
    assert best is not None, "one was applied"
    points = ", ".join(f"{drop:.4g} at {cost:,.0f}" for cost, drop in gate.curve)
    bound = f" (95 % confidence bound {best.bound:.4g})" if limit.confident else ""
    return AccuracyNotMet(
        f"No plan keeps the drop within {limit.accuracy_drop}: the least found is {best.drop:.4g}{bound}, with "
        f"{best.plan.average_bits:.3f} bits on average. Allow that drop, profile wider schemes, or keep layers float. "
        f"Measured drop at {limit.minimize or 'size'}: {points}.",
        applied.result_of(best),
        gate.curve,
    )


def _front(profile: Profile, limit: Budget) -> list[Plan]:
    """The plans to choose from, cheapest first: the front, as far as the other limits allow, and their best plan."""
    plans = list(pareto(profile, limit=limit.minimize or "size"))
    others = limit.without_accuracy()
    if others is not None:
        plans = [plan for plan in plans if _within(profile, plan, limit)]
        plans.append(allocate(profile, others))
    distinct = {plan.digest(): plan for plan in plans}
    return sorted(distinct.values(), key=lambda plan: _cost(profile, plan, limit.minimize or "size"))


def _cost(profile: Profile, plan: Plan, name: str) -> int:
    """What ``name`` counts of a plan, as ``Budget.limits`` does."""
    return counted(profile, plan.schemes, plan.sites, name)


def _cursory(search: AccuracySearch, evaluate: Evaluate, plan: Plan) -> Metric:
    """The metric with a plan's formats, in the codes and ranges the profile was measured with; the model is float
    again after it.
    """
    ready, known = search.request.ready, search.evaluator.perturbations
    chosen = [known[k] for k in search.profile.chosen(plan.schemes, plan.sites)]
    weights = {p.owner: p.change for p in chosen if p.change.stored}
    ranges = {p.owner: p.change for p in chosen if not p.change.stored}
    with swapped_weights(ready.weights, {name: weight.dequantize() for name, weight in weights.items()}):
        simulated = SimulatedModel(ready.model, ready.sites, weights, ranges, ready.weights, ready.program.updated)
        return outcome_of(evaluate, QuantizedModel.of(simulated))
