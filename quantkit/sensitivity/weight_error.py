"""Damage without data: how wrong the weights are, relative to what they compute.

With inputs of equal size and no correlation, which is all that can be assumed of them, the squared error of an output
channel relative to its square is that of its weights. Networks scale every channel to be of use to the next layer
(BatchNorm does so explicitly), so a layer's damage is the mean of these over its output channels, and a plan's the sum
over layers: noise of layers in a row adds up. Folding BatchNorm changes none of it. In no unit of the loss.

"weight-error-zd" divides it by the layer's ZD (LayerwiseQuant, arXiv 2406.17415), taken in units of each channel's own
deviation: heavy tails count more. They widen a channel's step and are in its error already;
docs/results/without-data.md has what that does to plans.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from quantkit.errors import InvalidRequest
from quantkit.sensitivity.measure import Perturbation, Scores, Subject
from quantkit.sensitivity.registry import Cost, estimator

NORMAL_ZD = 0.158655  # of a normal distribution
_LEAST_SHARE = 1e-6  # of the largest channel's deviation: below, a channel carries nothing


@estimator("weight-error", Cost(lambda work: 0), inputs=False)
def weight_error(
    subject: Subject, perturbations: Sequence[Perturbation], progress: bool, generator: torch.Generator
) -> Scores:
    """Mean over output channels of the squared error of a weight relative to its square."""
    return _scores(subject, perturbations, channel_error, "relative error of weights")


@estimator("weight-error-zd", Cost(lambda work: 0), inputs=False)
def weight_error_zd(
    subject: Subject, perturbations: Sequence[Perturbation], progress: bool, generator: torch.Generator
) -> Scores:
    """The same over the layer's ZD, relative to that of a normal distribution."""

    def error(weight: Tensor, rounded: Tensor) -> float:
        return channel_error(weight, rounded) * NORMAL_ZD / max(channel_zd(weight), 1 / weight.numel())

    return _scores(subject, perturbations, error, "relative error of weights over ZD")


def channel_error(weight: Tensor, rounded: Tensor) -> float:
    """The squared error of each output channel over its square, the mean over channels that are not zero."""
    rows = weight.detach().flatten(1).double()
    squares = rows.square().sum(1)
    errors = (rounded.flatten(1).to(rows) - rows).square().sum(1)
    alive = squares > 0
    return float((errors[alive] / squares[alive]).mean()) if alive.any() else 0.0


def channel_zd(weight: Tensor) -> float:
    """The share of weights more than one standard deviation above the mean of their own output channel."""
    rows = weight.detach().flatten(1).double()
    away, deviation = rows - rows.mean(1, keepdim=True), rows.std(1, correction=0, keepdim=True)
    alive = (deviation > _LEAST_SHARE * deviation.max()).squeeze(1)
    return float((away > deviation)[alive].double().mean()) if alive.any() else NORMAL_ZD


def _scores(
    subject: Subject, perturbations: Sequence[Perturbation], error: Callable[[Tensor, Tensor], float], name: str
) -> Scores:
    """``error`` of every weight and what it is rounded to. Inputs that are quantized as they come count nothing where
    there is one format for all of them, so that nothing is to be decided.
    """
    inputs = [p for p in perturbations if p.at_site]
    if len({p.format for p in inputs}) > 1 or any(p.change.static for p in inputs):
        raise InvalidRequest(
            f"The error of weights says nothing of activations, and {inputs[0].owner!r} would be {inputs[0].format}. "
            "Use weight-only schemes such as 'w4', or another sensitivity."
        )
    damage = [error(subject.floats[p.owner], p.change.dequantize()) if p.change.stored else 0 for p in perturbations]
    return Scores(np.array(damage, dtype=float), np.zeros(len(damage)), notes={"damage": name})
