"""The user's own metric: one number for a model, or one for each sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from quantkit.errors import InvalidRequest

Outcome = float | np.ndarray
Evaluate = Callable[[nn.Module], Any]


def require_metric(evaluate: Any) -> None:
    """Raise InvalidRequest for an ``evaluate`` that is no function."""
    if evaluate is not None and not callable(evaluate):
        raise InvalidRequest(f"evaluate must be a function (model -> metric), not {type(evaluate).__name__}.")


def outcome_of(evaluate: Evaluate, model: nn.Module) -> Outcome:
    """What ``evaluate`` says of a model: a number, or float64 (samples,) where it returns a sequence of them.

    Raises InvalidRequest where it returns neither, or something that is not finite.
    """
    found = evaluate(model)
    try:
        values = np.asarray(found.detach().cpu() if isinstance(found, torch.Tensor) else found, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidRequest(f"evaluate returned {found!r:.60}, not a number. Let it return the metric.") from error
    if values.size == 0 or not np.isfinite(values).all():
        raise InvalidRequest(f"evaluate returned {found!r:.60}: a metric is a finite number, or one for each sample.")
    return float(values.item()) if values.size == 1 else values.reshape(-1)


def metric_of(evaluate: Evaluate, model: nn.Module) -> float:
    """The metric of a model, the mean over samples where it is one number for each."""
    return float(np.mean(outcome_of(evaluate, model)))
