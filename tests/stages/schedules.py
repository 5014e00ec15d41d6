"""``quantkit.apply`` and ``quantize`` with schedules of the test's own: what they learn has to take seconds."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from quantkit import api
from quantkit.plan import Plan
from quantkit.program.updates import own_modes
from quantkit.reconstruction.learning import LearningOptions, Schedule
from quantkit.session import Session
from quantkit.stages.apply import Application, apply_plan
from quantkit.stages.inputs import Inputs
from quantkit.stages.options import ApplyOptions, Run
from quantkit.stages.quantize import Search, quantize_request
from quantkit.stages.request import DEFAULT_TARGET, make_ready
from quantkit.stages.result import Result
from quantkit.targets import Target


def all_of(schedule: Schedule) -> LearningOptions:
    """One schedule for everything."""
    return LearningOptions(network=schedule, block=schedule, layer=schedule, tuning=schedule)


def shorten(learning: LearningOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the verbs themselves learn by this schedule until the test ends."""
    monkeypatch.setattr(api, "ApplyOptions", partial(ApplyOptions, learning=learning))


def _asked(
    learning: LearningOptions,
    correction: str | None = "auto",
    inplace: bool = False,
    progress: bool = False,
    workdir: Path | None = None,
    **options: Any,
) -> Application:
    how = ApplyOptions(correction=correction or "none", learning=learning, **options)
    return Application(how, run=Run(progress, workdir), inplace=inplace)


@own_modes()
def apply_with(
    learning: LearningOptions,
    model: nn.Module,
    plan: Any,
    calibration: Any,
    *,
    samples: int | None = None,
    target: Any = DEFAULT_TARGET,
    **options: Any,
) -> Result:
    """The result of ``quantkit.apply`` with these ``options``."""
    asked = _asked(learning, **options)
    session = Session.open(model, Inputs.of(model, calibration, None, samples), Target.load(target))
    return apply_plan(session, Plan.of(plan), asked)


@own_modes()
def quantize_with(
    learning: LearningOptions,
    model: nn.Module,
    budget: str,
    calibration: Any,
    schemes: list[str] | None = None,
    **options: Any,
) -> Result:
    """The result of ``quantkit.quantize`` with these ``options`` of how its plan is applied."""
    asked = _asked(learning, **options)
    request = make_ready(model, calibration, schemes=schemes)
    return quantize_request(request, Search.of(budget, "auto", "fast", asked))
