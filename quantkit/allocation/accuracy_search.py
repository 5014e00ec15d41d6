"""A limit on accuracy: the cheapest plan whose evaluated accuracy is good enough.

Along a front of plans by bisection, and layer by layer along an order of sensitivity ("Augmenting Hessians with
Inter-Layer Dependencies", arXiv 2306.04879, docs/methods/accuracy-bisection.md: one bisection per bit level, from high
to low). Accuracy is assumed to rise with the cost and is not trusted to: what is returned was itself evaluated, and so
were its neighbours. An evaluation takes forwards of a whole data set; each plan is evaluated once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from quantkit.errors import InvalidRequest
from quantkit.formats import Scheme
from quantkit.plan import Plan

NEIGHBOURS = 2
ONE_SIDED_95 = 1.6448536269514722  # the normal quantile
Metric = float | Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Evaluation:
    """A plan's ``cost`` (what is to be small), the drop of its metric, and the one-sided 95 % upper confidence bound
    of that drop (NaN unless the metric came per sample).
    """

    plan: Plan
    cost: float
    drop: float
    bound: float


@dataclass
class AccuracyGate:
    """Evaluates plans against a largest drop of the metric, each plan once.

    ``evaluate`` gives a plan's metric, or one number per sample, higher is better; ``reference`` is the same of the
    float model. With ``confident`` the confidence bound must meet the limit, not the drop itself. ``admits``: whether
    a plan meets all other limits. Raises InvalidRequest where numbers per sample are needed and there are none, or
    counts differ.
    """

    evaluate: Callable[[Plan], Metric]
    reference: Metric
    allowed: float
    cost: Callable[[Plan], float]
    confident: bool = False
    admits: Callable[[Plan], bool] = lambda plan: True
    seen: dict[str, Evaluation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.confident and np.ndim(self.reference) == 0:
            raise InvalidRequest(
                "A confidence bound of the accuracy drop needs one number per sample from evaluate; it returned one."
            )

    def look(self, plan: Plan) -> Evaluation:
        """The evaluation of a plan; made once."""
        key = plan.digest()
        if key not in self.seen:
            drop, bound = drop_of(self.reference, self.evaluate(plan))
            self.seen[key] = Evaluation(plan, self.cost(plan), drop, bound)
        return self.seen[key]

    def meets(self, plan: Plan) -> bool:
        return self.accepts(self.look(plan))

    def accepts(self, evaluation: Evaluation) -> bool:
        return (evaluation.bound if self.confident else evaluation.drop) <= self.allowed

    def least_drop(self) -> Evaluation | None:
        """Of everything evaluated within the other limits the one with the least drop."""
        return min((e for e in self.seen.values() if self.admits(e.plan)), key=lambda one: one.drop, default=None)

    def cheapest(self) -> Evaluation | None:
        """Of everything evaluated the cheapest that meets all limits, the least drop among equals."""
        good = [one for one in self.seen.values() if self.accepts(one) and self.admits(one.plan)]
        return min(good, key=lambda one: (one.cost, one.drop), default=None)

    @property
    def curve(self) -> tuple[tuple[float, float], ...]:
        """(cost, drop) of everything evaluated, cheapest first."""
        return tuple(sorted((one.cost, one.drop) for one in self.seen.values()))


def drop_of(reference: Metric, metric: Metric) -> tuple[float, float]:
    """(drop of the metric, its paired one-sided 95 % upper bound: mean + 1.645 standard errors of the differences).

    The bound is NaN where the metric is a single number. Raises InvalidRequest for counts that differ and for NaN.
    """
    before, after = np.asarray(reference, dtype=np.float64), np.asarray(metric, dtype=np.float64)
    if before.shape != after.shape:
        raise InvalidRequest(
            f"evaluate returned {after.size} numbers for a plan and {before.size} for the float model."
        )
    difference = before - after
    if not np.isfinite(difference).all():
        raise InvalidRequest("evaluate returned a number that is not finite.")
    if difference.ndim == 0:
        return float(difference), math.nan
    count = difference.size
    error = difference.std(ddof=1) / math.sqrt(count) if count > 1 else math.inf
    return float(difference.mean()), float(difference.mean() + ONE_SIDED_95 * error)


def along_front(front: Sequence[Plan], gate: AccuracyGate) -> Evaluation | None:
    """The cheapest plan of a front (cheapest first) that meets the limit, by bisection; then its cheaper neighbours
    are evaluated too, since accuracy need not be monotone. None where even the most costly does not.
    """
    if not front or not gate.meets(front[-1]):
        return None
    low, high = -1, len(front) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if gate.meets(front[middle]) else (middle, high)
    for plan in front[max(0, high - NEIGHBOURS) : high]:
        gate.look(plan)
    return gate.cheapest()


def between(
    gate: AccuracyGate, plan_at: Callable[[float], Plan], tries: int, least: float | None = None, apart: float = 1e-3
) -> Evaluation | None:
    """Plans between the points of a front: bisection on the cost, from the cheapest evaluated plan that meets the
    limit down to the most costly cheaper one that does not (to a cost of ``least``, if given, where there is none),
    ``plan_at(cost)`` the best plan of at most that cost. Costs that differ by no more than a share of ``apart``
    (above 0) are near enough.
    """
    accepted = gate.cheapest()
    cheaper = [one.cost for one in gate.seen.values() if accepted is not None and one.cost < accepted.cost]
    low = max(cheaper, default=least)
    if accepted is None or low is None:
        return accepted
    high = accepted.cost
    while tries and high - low > apart * high:
        middle = (low + high) / 2
        plan = plan_at(middle)
        cost = gate.cost(plan)
        if cost <= low:  # nothing lies between them: costs have gaps where one layer dominates
            low = middle
            continue
        if plan.digest() in gate.seen or cost >= high:
            break
        low, high = (low, cost) if gate.meets(plan) else (cost, high)
        tries -= 1
    return gate.cheapest()


def rising(gate: AccuracyGate, front: Sequence[Plan], apart: float) -> Iterator[Sequence[Plan]]:
    """The plans to apply one after the other until one meets the limit, cheapest first: one by
    one those that meet it here, where their costs differ by more than a share of ``apart``, and the most costly of
    them; then for ``first_that_meets`` what costs more on the front.
    """
    good = [one.plan for one in gate.seen.values() if gate.accepts(one) and gate.admits(one.plan)]
    if not good:
        yield front[-1:]
        return
    good.sort(key=gate.cost)
    last = 0.0
    for plan in good:
        if gate.cost(plan) > (1 + apart) * last or plan is good[-1]:
            last = gate.cost(plan)
            yield [plan]
    yield [plan for plan in front if gate.cost(plan) > gate.cost(good[-1])]


def first_that_meets(plans: Sequence[Plan], gate: AccuracyGate) -> Evaluation | None:
    """The first of some plans (cheapest first) that meets the limit, in steps that double: what is skipped is left to
    ``between``. The last one is always tried before giving up.
    """
    step = 1
    while plans:
        evaluation = gate.look(plans[0])
        if gate.accepts(evaluation):
            return evaluation
        plans, step = (plans[step:] or plans[-1:]) if len(plans) > 1 else (), 2 * step
    return None


def by_levels(
    order: Sequence[str],
    levels: Sequence[Mapping[str, Scheme]],
    plan_of: Callable[[Mapping[str, Scheme]], Plan],
    gate: AccuracyGate,
) -> Evaluation | None:
    """Layer by layer: at each level (high to low bits) the longest prefix of ``order`` (least sensitive first) that
    can take it; only those layers go on to the next level.

    ``levels[k]`` gives every layer's scheme at level k, the first where all start; ``plan_of`` makes a plan of a
    scheme per layer. About log2(layers) evaluations a level. None where the first level does not meet the limit.
    """
    schemes = dict(levels[0])
    if not gate.meets(plan_of(schemes)):
        return None
    allowed = list(order)
    for level in levels[1:]:
        plans = [plan_of(schemes | {n: level[n] for n in allowed[:count]}) for count in range(len(allowed) + 1)]
        low, high = 0, len(plans)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if gate.meets(plans[middle]) else (low, middle)
        beyond = [n for n in range(low + 1, min(low + NEIGHBOURS + 1, len(plans))) if gate.meets(plans[n])]
        allowed = allowed[: max([low, *beyond])]
        schemes |= {name: level[name] for name in allowed}
    return gate.cheapest()
