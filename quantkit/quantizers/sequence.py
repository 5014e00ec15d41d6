"""Rounding a network layer by layer, each on the inputs it really gets from the network quantized so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from quantkit.formats import WeightFormat
from quantkit.graph.layers import bias_of, groups_of, weight_of
from quantkit.graph.trace import Trace
from quantkit.progress import track
from quantkit.quantizers.simulate import SimulatedModel
from quantkit.quantizers.statistics import layer_hessians
from quantkit.quantizers.weights import quantize_weight, rounding_note


def round_in_sequence(
    simulated: SimulatedModel,
    trace: Trace,
    formats: Mapping[str, WeightFormat],
    batches: Sequence[Any],
    rounding: str = "auto",
    progress: bool = True,
) -> dict[str, str]:
    """Give every layer of ``formats`` (in execution order) its codes; returns how each was rounded."""
    how = {}
    for name in track(formats, "quantizing layers", enabled=progress):
        hessian = None if rounding == "nearest" else layer_hessians(simulated, trace, [name], batches)[name]
        model = simulated.model
        rounded = quantize_weight(weight_of(model, name), [formats[name]], hessian, groups_of(model, name))
        simulated.set_weight(name, rounded.weights[formats[name]])
        how[name] = rounding_note(name, rounded, rounding)
    return how


def round_biases(simulated: SimulatedModel, inputs: Mapping[str, Sequence[str]]) -> None:
    """Put biases on the grid an integer kernel adds them on: multiples of input scale x weight scale, in 32 bits.

    ``inputs`` are the sites each layer reads; a layer reading several has no single grid and keeps its bias, whose
    rounding is then left to the runtime.
    """
    for name, weight in simulated.weights.items():
        bias = bias_of(simulated.model, name)
        if bias is None or len(inputs[name]) != 1 or weight.scale.shape[1] != 1:
            continue
        step = simulated.ranges[inputs[name][0]].scale * weight.scale.squeeze(1)
        with torch.no_grad():
            bias.copy_(torch.round(bias / step) * step)
