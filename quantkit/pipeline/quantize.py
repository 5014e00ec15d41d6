"""The whole path in one call: profile, allocate, apply, compare."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from quantkit.allocation.allocate import allocate
from quantkit.allocation.solve import require_solver
from quantkit.budget import Budget
from quantkit.errors import InvalidRequest
from quantkit.pipeline.apply import Evaluate, apply
from quantkit.pipeline.profile import measure
from quantkit.pipeline.request import DEFAULT_TARGET, Schemes, make_ready
from quantkit.pipeline.result import Result
from quantkit.store import require_writable
from quantkit.targets import Target
from quantkit.targets.rules import Rules


def quantize(
    model: nn.Module,
    budget: str | Budget | Mapping[str, Any],
    calibration: Any,
    *,
    schemes: Schemes | None = None,
    samples: int | None = None,
    loss: str = "auto",
    evaluate: Evaluate | None = None,
    target: str | Target = DEFAULT_TARGET,
    rules: Rules | None = None,
    sensitivity: str = "gram",
    solver: str = "auto",
    rounding: str = "auto",
    ranges: str = "mse",
    seed: int = 0,
    progress: bool = True,
    workdir: str | Path | None = None,
    inplace: bool = False,
) -> Result:
    """The best model inside ``budget``: profile, allocate, apply, and a measured comparison with the float model.

    See ``profile`` and ``apply`` for the arguments; ``evaluate`` is only reported. Raises InvalidRequest for a bad
    request and InfeasibleBudget for one that cannot be met, both before anything is measured.
    """
    limit = Budget.parse(budget)
    require_solver(solver)
    if workdir is not None:
        require_writable(workdir)
    if evaluate is not None and not callable(evaluate):
        raise InvalidRequest(f"evaluate must be a function (model -> float), not {type(evaluate).__name__}.")
    request = make_ready(
        model, calibration, schemes=schemes, samples=samples, loss=loss, target=target, rules=rules,
        sensitivity=sensitivity, rounding=rounding, ranges=ranges, seed=seed,
    )  # fmt: skip
    allocate(request.unmeasured(), limit)
    measured = measure(request, progress, workdir)
    plan = allocate(measured, limit, solver=solver, seed=seed)
    items = [kwargs or args for args, kwargs in request.batches]
    result = apply(
        model, plan, items, target=target, rounding=rounding, ranges=ranges, loss=loss, evaluate=evaluate,
        progress=progress, inplace=inplace,
    )  # fmt: skip
    result.profile = measured
    return result
