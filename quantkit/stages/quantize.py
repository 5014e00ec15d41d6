"""The whole path in one call: profile, allocate, apply, compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from quantkit.allocation.allocate import allocate
from quantkit.allocation.execution_problem import needs_execution
from quantkit.allocation.from_profile import candidates, with_float
from quantkit.allocation.plan_costs import counted
from quantkit.allocation.solve import require_solver
from quantkit.budget import Budget
from quantkit.errors import InvalidRequest
from quantkit.formats import Scheme
from quantkit.plan import Plan, Profile
from quantkit.stages.accuracy import meet_accuracy, require_accuracy_request
from quantkit.stages.apply import apply
from quantkit.stages.metric import Evaluate, require_metric
from quantkit.stages.operating_point import EFFORTS, refine
from quantkit.stages.profile import evaluator_of, measure
from quantkit.stages.request import DEFAULT_TARGET, Request, Schemes, TargetName, choose, make_ready, require_choices
from quantkit.stages.result import Result
from quantkit.store import require_writable
from quantkit.targets.rules import Rules


def quantize(
    model: nn.Module,
    budget: str | Budget | Mapping[str, Any],
    calibration: Any = None,
    *,
    example_inputs: Any = None,
    schemes: Schemes | None = None,
    samples: int | None = None,
    loss: str = "auto",
    evaluate: Evaluate | None = None,
    target: TargetName = DEFAULT_TARGET,
    rules: Rules | None = None,
    first_last: str = "same",
    sensitivity: str = "auto",
    solver: str = "auto",
    effort: str = "fast",
    rounding: str = "auto",
    ranges: str = "mse",
    reconstruction: str = "auto",
    correction: str | None = "auto",
    reparameterization: str = "auto",
    seed: int = 0,
    progress: bool = True,
    workdir: str | Path | None = None,
    inplace: bool = False,
) -> Result:
    """The best model inside ``budget``: profile, allocate, apply, and a measured comparison with the float model.

    Without ``calibration`` only weights are quantized, by what is known of them alone; ``example_inputs``, one batch
    of inputs, then lets the model be traced, which folds BatchNorm and counts operations.

    See ``profile`` and ``apply`` for the arguments; ``evaluate`` is only reported, unless the budget limits
    ``accuracy_drop``: then plans are chosen by it, first with the profile's codes; the cheapest of them and 2, 4 or 6
    still cheaper ones (with ``effort``) are applied, minutes each, since what is learned decides how small a plan may
    be. Otherwise "fast" takes the plan that the profile predicts best; "balanced" and "thorough" improve it by
    measuring around it, with at most 1.5 and 3 measurements per profiled format. Raises InvalidRequest for a bad
    request and InfeasibleBudget for one that cannot be met, both before anything is measured; AccuracyNotMet when no
    plan keeps the accuracy.
    """
    limit = _checked(budget, solver, effort, evaluate, workdir, inplace)
    how = _ways(reconstruction, correction or "none", reparameterization)
    request = make_ready(
        model, calibration, example_inputs=example_inputs, schemes=schemes, samples=samples, loss=loss,
        target=target, rules=rules, first_last=first_last, sensitivity=sensitivity, rounding=rounding, ranges=ranges,
        seed=seed,
    )  # fmt: skip
    request.inputs.require_none(effort=effort, **how)
    finish = partial(
        apply, model, calibration=request.inputs.items(), example_inputs=example_inputs, target=target, loss=loss,
        rounding=rounding, ranges=ranges, seed=seed, progress=progress, workdir=workdir, inplace=inplace, **how,
    )  # fmt: skip
    return _carried_out(request, limit, evaluate, finish, solver, effort, progress, workdir)


def _ways(reconstruction: str, correction: str, reparameterization: str) -> dict[str, Any]:
    """How the plan is to be met beside what the profile depends on too, checked."""
    how = {"reconstruction": reconstruction, "correction": correction, "reparameterization": reparameterization}
    require_choices(**how)
    return how


def _carried_out(
    request: Request,
    limit: Budget,
    evaluate: Evaluate | None,
    finish: Callable[..., Result],
    solver: str,
    effort: str,
    progress: bool,
    workdir: str | Path | None,
) -> Result:
    if limit.accuracy_drop is not None:
        return _within_accuracy(request, limit, evaluate, finish, effort, progress, workdir)
    measured, plan = _decide(request, limit, solver, effort, progress, workdir)
    return replace(finish(plan, evaluate=evaluate), profile=measured)


def _checked(
    budget: str | Budget | Mapping[str, Any],
    solver: str,
    effort: str,
    evaluate: Evaluate | None,
    workdir: str | Path | None,
    inplace: bool,
) -> Budget:
    """The budget, after refusing what is wrong with a request whatever the model."""
    limit = Budget.parse(budget)
    require_solver(solver)
    choose("effort", effort, EFFORTS)
    if workdir is not None:
        require_writable(workdir)
    require_metric(evaluate)
    require_accuracy_request(limit, evaluate, inplace)
    return limit


def _decide(
    request: Request, limit: Budget, solver: str, effort: str, progress: bool, workdir: str | Path | None
) -> tuple[Profile, Plan]:
    """The profile of a request, and the plan that solver and effort find from it."""
    blank = request.unmeasured()
    _require_work(blank, limit)
    allocate(blank, limit)  # refuses what cannot be met before anything is measured
    seed = request.settings["seed"]
    evaluator = None if effort == "fast" else evaluator_of(request, progress, workdir)
    measured = measure(request, progress, workdir, evaluator)
    plan = allocate(measured, limit, solver=solver, seed=seed)
    return measured, plan if evaluator is None else refine(plan, measured, limit, evaluator, effort, seed, progress)


def _require_work(profile: Profile, limit: Budget) -> None:
    """Raise InvalidRequest where layers may stay float and all of them do: the float model is within the limit."""
    limits = limit.limits(profile)
    free = all(Scheme() in options for options in with_float(profile, candidates(profile)).values())
    floating = dict.fromkeys(profile.layers, Scheme())
    within = all(counted(profile, floating, {}, name) <= most for name, most in limits.items())
    if needs_execution(limits) and free and within:
        raise InvalidRequest(f"The float model is within {limit} as it is: nothing has to be quantized. Ask for less.")


def _within_accuracy(
    request: Request,
    limit: Budget,
    evaluate: Evaluate | None,
    finish: Callable[[Plan], Result],
    effort: str,
    progress: bool,
    workdir: str | Path | None,
) -> Result:
    assert evaluate is not None, "checked before"
    if limit.minimize == "latency":
        Budget(latency="100%").limits(request.unmeasured())  # refuses where no times were measured
    others = limit.without_accuracy()
    if others is not None:
        allocate(request.unmeasured(), others)
    evaluator = evaluator_of(request, progress, workdir)
    measured = measure(request, progress, workdir, evaluator)
    result = meet_accuracy(request, measured, evaluator, limit, evaluate, finish, effort)
    return replace(result, profile=measured)
