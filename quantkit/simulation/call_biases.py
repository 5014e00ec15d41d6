"""The biases of calls that add them on grids of their own (``program.integer_biases``), as their kernels have them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from quantkit.numbers.kinds import AnyRange, AnyWeight
from quantkit.numbers.uniform import fake_quantize
from quantkit.program.integer_biases import BiasCall
from quantkit.program.intercept import OpKey
from quantkit.program.layers import Weights

CallBiases = dict[OpKey, tuple[Tensor, Tensor]]
_INT32 = torch.iinfo(torch.int32)


def bias_step(weight: AnyWeight | None, site: AnyRange | None) -> Tensor | None:
    """The step of a bias, for each output channel, beside these codes; None where there is no one for a channel."""
    if weight is None or not weight.integer or weight.scale.shape[1] != 1:
        return None
    if site is None or not (site.static and site.integer):
        return None
    return site.scale * weight.scale.squeeze(1)


def call_biases(
    calls: Iterable[BiasCall], floats: Weights, weights: Mapping[str, AnyWeight], ranges: Mapping[str, AnyRange]
) -> CallBiases:
    """The layer's bias and what it is rounded to, by the key of each call, with straight-through gradients."""
    found = {}
    for call in calls:
        bias, step = floats.bias(call.layer), bias_step(weights.get(call.layer), ranges.get(call.site))
        if bias is not None and step is not None:
            step = step.to(bias.device)
            found[call.key] = bias, fake_quantize(bias, step, torch.zeros_like(step), _INT32.min, _INT32.max)
    return found
