"""Rounding a network layer by layer, each on the inputs it really gets from the network quantized so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantkit.numbers.uniform import QuantizedWeight
from quantkit.program.program import Program
from quantkit.progress import track
from quantkit.ranges.statistics import layer_hessians
from quantkit.rounding.moments import Moments
from quantkit.rounding.request import RoundingRequest
from quantkit.simulation.model import SimulatedModel

LARGEST_BIAS = 1 << 30  # leaves half of an INT32 accumulator to the products


def round_in_sequence(
    simulated: SimulatedModel, program: Program, batches: Sequence[Any], request: RoundingRequest
) -> dict[str, str]:
    """Give every layer of ``request`` its codes; returns how each was rounded."""
    how = {}
    for name in track(request.formats, "quantizing layers", enabled=request.progress):
        seen = partial(_moments, simulated, program, name, batches, request.most(name, program.weights[name]))
        weight, how[name] = request.rounded(simulated.floats, name, seen)
        simulated.set_weight(name, weight)
    return how


def _moments(
    simulated: SimulatedModel, program: Program, name: str, batches: Sequence[Any], most: int
) -> Moments | None:
    return layer_hessians(simulated, program, [name], batches, most).get(name)


def round_biases(simulated: SimulatedModel, inputs: Mapping[str, Sequence[str]]) -> None:
    """Put biases on the grid an integer kernel adds them on: multiples of input scale x weight scale, in 32 bits.

    ``inputs`` are the sites each layer reads. A bias without a single grid stays as it is: that of a layer reading
    several sites or one with a scale for each token, and those that each of ``bias_calls`` rounds for itself. Channels
    whose weights are so small that the bias does not fit, as a vanished BatchNorm gain leaves them, get a coarser
    weight scale.
    """
    by_call = {simulated.floats.layers[call.layer].bias for call in simulated.bias_calls}
    for name, weight in list(simulated.weights.items()):
        bias, sites = simulated.floats.bias(name), [simulated.ranges.get(site) for site in inputs[name]]
        scales = [site.scale for site in sites if site is not None and site.static and site.integer]
        if bias is None or not weight.integer or weight.scale.shape[1] != 1 or not scales:
            continue
        with torch.no_grad():
            exact = bias.cpu()
            least = exact.abs().unsqueeze(1) / LARGEST_BIAS / min(scales)
            if (weight.scale.abs() < least).any():
                weight = _coarser(weight, least)
                simulated.set_weight(name, weight)
            if len(sites) == 1 and simulated.floats.layers[name].bias not in by_call:
                step = scales[0] * weight.scale.squeeze(1)
                bias.copy_(torch.round(exact / step) * step)


def _coarser(weight: QuantizedWeight, least: Tensor) -> QuantizedWeight:
    """``weight`` with scales (O, 1) of at least ``least``, its codes rounded again where that changes them."""
    scale = torch.where(weight.scale < 0, -1.0, 1.0) * torch.maximum(weight.scale.abs(), least)
    coarser = weight.with_scale(scale)
    return replace(coarser, codes=coarser.quantize(weight.dequantize()).codes)
