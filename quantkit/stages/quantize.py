"""From a request to a quantized model: profile, allocate, search as far as was asked, apply."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from quantkit.allocation.allocate import allocate
from quantkit.allocation.execution_problem import needs_execution
from quantkit.allocation.from_profile import candidates, with_float
from quantkit.allocation.only_plan import only_plan
from quantkit.allocation.plan_costs import counted
from quantkit.allocation.solve import require_solver
from quantkit.budget import Budget
from quantkit.errors import InvalidRequest
from quantkit.formats import EIGHT_BITS, Scheme
from quantkit.plan import Plan, Profile
from quantkit.stages.accuracy import AccuracySearch, Finish, accurate_enough, meet_accuracy, require_accuracy_request
from quantkit.stages.against_uniform import no_worse_than_uniform
from quantkit.stages.apply import Application, apply_plan
from quantkit.stages.file_size import Choose, FileLengths, FileLimit, fitting_plan, require_file, smallest_file
from quantkit.stages.metric import require_metric
from quantkit.stages.operating_point import EFFORTS, refine
from quantkit.stages.options import Schemes, choose
from quantkit.stages.outliers import transformed
from quantkit.stages.profile import announced_evaluator, measure
from quantkit.stages.reconstruct import samples_enough
from quantkit.stages.request import Request
from quantkit.stages.result import Result

AUTO = "auto"


@dataclass(frozen=True)
class Search:
    """What is looked for: the limits, by which solver and effort, and how plans are applied."""

    limit: Budget
    solver: str
    effort: str
    application: Application

    @classmethod
    def of(
        cls, budget: str | Scheme | Budget | Mapping[str, Any], solver: str, effort: str, application: Application
    ) -> Search:
        """The search, after refusing what is wrong with a request whatever the model."""
        limit = Budget.parse(budget)
        require_solver(solver)
        choose("effort", effort, EFFORTS)
        require_metric(application.evaluate)
        require_accuracy_request(limit, application.evaluate, application.inplace)
        return cls(limit, solver, effort, application)


def candidates_of(limit: Budget, schemes: Schemes | None) -> dict[str, Any]:
    """What a budget and ``schemes`` make the candidates, as fields of ProfileOptions. Raises InvalidRequest where the
    budget is a scheme that is not among ``schemes``.
    """
    if limit.scheme is None:
        return {"schemes": schemes}
    named = schemes.replace(",", " ").split() if isinstance(schemes, str) else schemes
    if named is not None and str(limit.scheme) not in {str(Scheme.parse(scheme)) for scheme in named}:
        raise InvalidRequest(
            f"The budget {limit.scheme} is the scheme of every layer that can take it, and is not among "
            f"schemes={schemes!r}. Leave schemes out; rules give single layers another scheme."
        )
    return {"schemes": [str(limit.scheme)], "everywhere": True}


def transformed_within(request: Request, search: Search, transforms: str) -> Request:
    """The request with its model transformed, after refusing what no plan can meet: transforms are tried by running
    the model.
    """
    search.application.options.require_known(request.inputs)
    request.inputs.require_none(effort=search.effort)
    certain = search.limit.without_accuracy()
    if certain is not None and certain.file_size is None:
        blank = request.unmeasured()
        if only_plan(blank, certain) is None:
            allocate(blank, certain)
    return transformed(request, transforms)


def quantize_request(request: Request, search: Search) -> Result:
    """The best model inside the limits."""
    if search.limit.file_size is not None:
        return _within_file(request, search)
    only, accuracy = only_plan(request.unmeasured(), search.limit), search.limit.accuracy_drop is not None
    if accuracy:
        return _within_accuracy(request, search) if only is None else _accurate_enough(request, search, only)
    if only is not None:
        asked = replace(search.application, may_be_float=_may_be_float(request, search))
        return apply_plan(request.session, only, asked)
    measured, plan = _decide(request, search)
    return replace(apply_plan(request.session, plan, search.application), profile=measured)


def _may_be_float(request: Request, search: Search) -> tuple[str, ...]:
    """The layers that a budget such as "w8a8" does not insist on: all that no rule names. Narrower weights are asked
    for to save bytes, whatever they cost.
    """
    scheme = Scheme() if search.limit.scheme is None else Scheme.parse(search.limit.scheme)
    if scheme.weight is None or scheme.weight.bits < EIGHT_BITS:
        return ()
    if scheme.activation is None or scheme.activation.dynamic:
        return ()
    return tuple(name for name in request.ready.quantizable if name not in request.by_rule)


def _within_file(request: Request, search: Search) -> Result:
    """The best model whose file is within a limit, all other limits included."""
    limit, session, blank = search.limit, request.session, request.unmeasured()
    session.target.require_files()
    length = FileLengths(session)
    least = smallest_file(blank, limit, length)

    def fitting(choose: Choose) -> tuple[Plan, Budget]:
        return fitting_plan(choose, FileLimit(limit, blank, length, least))

    asked, measured = limit.with_tensors(limit.file_bytes, blank), None
    only = only_plan(blank, asked)
    if only is not None:
        plan, _ = fitting(lambda _: only)
    else:
        measured, plan = _decide(request, replace(search, limit=asked), fitting)
    plan = replace(plan, provenance=plan.provenance | {"budget": str(limit)})
    result = apply_plan(session, plan, search.application)
    require_file(result, length, limit, blank)
    return replace(result, profile=measured)


def _decide(
    request: Request, search: Search, fitting: Callable[[Choose], tuple[Plan, Budget]] | None = None
) -> tuple[Profile, Plan]:
    """The profile of a request, and the plan that solver and effort find from it. ``fitting`` may tighten the limits
    until what is chosen within them fits.
    """
    limit, run = search.limit, search.application.run
    blank = request.unmeasured()
    _require_work(blank, limit)
    allocate(blank, limit)  # refuses what cannot be met before anything is measured
    evaluator = None if search.effort == "fast" else announced_evaluator(request, run)
    measured = measure(request, run, evaluator)
    seed = request.settings["seed"]

    def choose(profile: Profile) -> tuple[Plan, Budget]:
        def within(limit: Budget) -> Plan:
            return allocate(profile, limit, solver=search.solver, seed=seed)

        return (within(limit), limit) if fitting is None else fitting(within)

    plan, most = choose(measured)
    if evaluator is not None:
        plan = refine(plan, measured, most, evaluator, search.effort, run.progress)
    if search.solver != AUTO or not request.batches:
        return measured, plan
    on_codes, asked = needs_execution(most.limits(measured)), search.application
    within = partial(no_worse_than_uniform, request.session, measured, plan, lambda one: choose(one)[0], asked)
    return measured, within(on_codes=on_codes)


def _require_work(profile: Profile, limit: Budget) -> None:
    """Raise InvalidRequest where layers may stay float and all of them do: the float model is within the limit."""
    limits = limit.limits(profile)
    free = all(Scheme() in options for options in with_float(profile, candidates(profile)).values())
    floating = dict.fromkeys(profile.layers, Scheme())
    within = all(counted(profile, floating, {}, name) <= most for name, most in limits.items())
    if needs_execution(limits) and free and within:
        raise InvalidRequest(f"The float model is within {limit} as it is: nothing has to be quantized. Ask for less.")


def _within_accuracy(request: Request, search: Search) -> Result:
    limit, run = search.limit, search.application.run
    if limit.minimize == "latency":
        Budget(latency="100%").limits(request.unmeasured())  # refuses where no times were measured
    others = limit.without_accuracy()
    if others is not None:
        allocate(request.unmeasured(), others)
    evaluator = announced_evaluator(request, run)
    measured = measure(request, run, evaluator)
    accuracy = AccuracySearch(request, measured, evaluator, limit, search.application.evaluate, search.effort)
    return replace(meet_accuracy(accuracy, _finisher(request, search)), profile=measured)


def _accurate_enough(request: Request, search: Search, plan: Plan) -> Result:
    """The result of the only plan there is, if it keeps the accuracy."""
    assert search.application.evaluate is not None, "checked before"
    return accurate_enough(request, plan, search.limit, search.application.evaluate, _finisher(request, search))


def _finisher(request: Request, search: Search) -> Finish:
    """What applies a plan to a copy of the model, and what does so with learning where "auto" may not."""
    application = replace(search.application, evaluate=None)
    learning = replace(application, options=replace(application.options, reconstruction="network"))

    def applied(application: Application, plan: Plan) -> Result:
        return apply_plan(request.session.fork(), plan, application)

    auto = application.options.reconstruction == "auto"
    enough = auto and samples_enough(request.batches) and not isinstance(request.session.replay, str)
    return Finish(partial(applied, application), partial(applied, learning) if enough else None)
