"""What stays float, stored as float16: which tensors, and their values rounded as the file will hold them.

Parameters and buffers that a model saves are float16 where that can hold them: weights without codes, biases, norms,
tables that no product reads. Float32 stay biases that integer kernels add in INT32, what a weight is computed from,
what the model updates as it runs, and tensors so small that widening them takes more of a file than it saves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from quantkit.numbers.half import LEAST_ELEMENTS, half_problem
from quantkit.plan import Layer
from quantkit.program.layers import Weights
from quantkit.program.ownership import Owned
from quantkit.program.program import Program
from quantkit.program.updates import named_state
from quantkit.simulation.model import SimulatedModel


def stored_as_halves(
    weights: Weights, program: Program, layers: Mapping[str, Layer], owned: Collection[Owned], tokens: bool
) -> frozenset[str]:
    """The parameters and buffers, by all their names, that are float16 where they stay float. ``tokens``: what layers
    read is quantized row by row, which leaves their biases float.
    """
    model, state = weights.model, named_state(weights.model)
    sources = {source for weight in weights.layers.values() if weight.parameter is None for source in weight.sources}
    on_grids = {weights.layers[name].bias for name, layer in layers.items() if layer.inputs and not tokens}
    out_of_reach = {*sources, *on_grids, *program.updated}
    saved = model.state_dict().keys() - out_of_reach

    parts = defaultdict(list)
    for part in owned:
        parts[part.name].append(part.layer)
    found = {
        id(state[name])
        for name, readers in parts.items()
        if name in saved and _can_be_half(state[name], readers) and not half_problem(state[name])
    }
    return frozenset(name for name, tensor in state.items() if id(tensor) in found)


def _can_be_half(tensor: Tensor, readers: Collection[str]) -> bool:
    """Whether a tensor with these layers in its parts ("" for what is in none) can be float16 part by part."""
    alone = len(readers) == 1
    worth = tensor.is_floating_point() and tensor.numel() >= LEAST_ELEMENTS
    return worth and (alone or ("" not in readers and tensor.dtype == torch.float32))


@torch.no_grad()
def store_floats_as_halves(simulated: SimulatedModel, names: Collection[str]) -> None:
    """Round what is float of these parameters and buffers to float16, in which files then store it. What has moved
    beyond it stays as it is.
    """
    state, floats = named_state(simulated.model), simulated.floats
    coded = {id(floats.tensor(p)) for n in simulated.weights if (p := floats.layers[n].parameter) is not None}
    for name in names:
        tensor = state[name]
        if id(tensor) in coded or half_problem(tensor):
            continue
        rounded = tensor.to(torch.float16)
        if tensor.dtype == torch.float32:
            tensor.copy_(rounded)
        else:
            tensor.data = rounded  # a matrix in another half precision
    for name, layer in floats.layers.items():
        beside = layer.parameter is not None and layer.parameter in names and name not in simulated.weights
        if beside and id(floats.tensor(str(layer.parameter))) in coded:
            floats.write(name, floats[name].to(torch.float16).float())
    simulated.half_floats = True
