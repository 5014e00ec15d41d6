"""Weights that lie in a graph otherwise than as one layer reads them: projections packed into one parameter, matrices
with inputs first, experts held in three dimensions, weights that the model computes.

Layers that are rows of one matrix, or one matrix turned, are quantized where they are. All others are stored as any
other layer's codes, dequantized, and laid out as the graph reads them by operators on constants, which onnxruntime
carries out once, when it loads the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from torch import Tensor

from quantkit.backends.onnxruntime.editing import Editor
from quantkit.program.layers import LayerWeight, Weights
from quantkit.simulation.model import SimulatedModel

# A layer's name -> its float32 weight, made of what is stored, output channels first
ValueOf = Callable[[str], ir.Value]


@dataclass(frozen=True)
class Held:
    """The layers in a marked value, in order: one alone, or output channels one after the other along the first axis.

    ``plain``: every one is there output channels first, or is a matrix with its inputs first (``turned``), so that
    codes can take the place of the value.
    """

    layers: tuple[str, ...]
    plain: bool = True
    turned: bool = False

    @property
    def name(self) -> str:
        """The name of what is stored of all of them."""
        return self.layers[0] if len(self.layers) == 1 else f"{self.layers[0]}.joined"

    def shape(self, floats: Weights) -> tuple[int, ...]:
        """The shape of the value."""
        layer = floats.layers[self.layers[0]]
        if layer.parameter is not None:
            return tuple(floats.tensor(layer.parameter).shape)
        return layer.shape if layer.region is None else layer.region.size


def held_in(simulated: SimulatedModel, name: str) -> Held | None:
    """What a mark of this name holds, where some of it is quantized; None where nothing is, and where layers are not
    all of it.
    """
    floats, coded = simulated.floats, simulated.weights
    layer = floats.layers.get(name)
    if layer is not None and (layer.parameter is None or _is_whole(layer)):
        return _alone(floats, name) if name in coded else None
    inside = [n for n, weight in floats.layers.items() if weight.parameter == name]
    if coded.keys().isdisjoint(inside) or name not in floats.covered(inside):
        return None
    if len(inside) == 1:
        return _alone(floats, inside[0])
    inside.sort(key=lambda n: region.offset if (region := floats.layers[n].region) is not None else 0)
    if not _follow_each_other(floats, name, inside):
        return None
    rows = all(_is_rows(floats.layers[n], floats.tensor(name)) for n in inside)
    return Held(tuple(inside), plain=rows and coded.keys() >= set(inside))


def _is_whole(layer: LayerWeight) -> bool:
    return layer.region is None and layer.order is None


def _alone(floats: Weights, name: str) -> Held:
    layer = floats.layers[name]
    size, order = _in_memory(layer)
    whole = layer.parameter is None or size is None or size == tuple(floats.tensor(layer.parameter).shape)
    turned = len(layer.shape) == 2 and order == (1, 0)
    return Held((name,), plain=whole and (turned or order is None), turned=whole and turned)


def _in_memory(layer: LayerWeight) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """The sizes of the region that a layer's weight is (None for all of a parameter) as they follow each other in
    memory, and the order of these axes that puts output channels first (None where they are): a product with a
    parameter that the model turns reads it in the end as a linear layer does.
    """
    region = layer.region
    if region is None:
        return None, layer.order
    axes = list(range(len(region.size)))
    if layer.parameter is not None:  # what the model computes is marked as it is read
        axes.sort(key=lambda axis: -region.stride[axis])
    order = tuple(axes.index(axis) for axis in layer.order or range(len(axes)))
    return tuple(region.size[axis] for axis in axes), None if order == tuple(range(len(axes))) else order


def _follow_each_other(floats: Weights, parameter: str, layers: list[str]) -> bool:
    """Whether layers are stretches of a parameter's memory, one after the other."""
    start = 0
    for layer in map(floats.layers.__getitem__, layers):
        size, _ = _in_memory(layer)
        if layer.region is None or size is None or layer.region.offset != start:
            return False
        if sorted(layer.region.stride, reverse=True) != [math.prod(size[axis + 1 :]) for axis in range(len(size))]:
            return False
        start += math.prod(size)
    return floats.tensor(parameter).is_contiguous()


def _is_rows(layer: LayerWeight, held: Tensor) -> bool:
    """Whether a layer is whole rows of what holds it, output channels first."""
    size, order = _in_memory(layer)
    return size is not None and order is None and size[1:] == tuple(held.shape[1:])


def composed(editor: Editor, before: ir.Node, simulated: SimulatedModel, held: Held, values: ValueOf) -> ir.Value:
    """The float32 value that holds layers, from the ``values`` of those that are quantized."""
    parts = [_laid_out(editor, before, simulated, name, values) for name in held.layers]
    if len(parts) == 1:
        return parts[0]
    name, size = f"{held.name}.weight", held.shape(simulated.floats)
    if not held.plain:  # parts may have other axes than the whole
        flat = editor.initializer(f"{name}.flat", np.array([-1], np.int64))
        parts = [editor.node(before, "Reshape", [part, flat], name) for part in parts]
    value = editor.node(before, "Concat", parts, name, axis=0)
    return value if held.plain else _reshaped(editor, before, value, name, (), size)


def _laid_out(editor: Editor, before: ir.Node, simulated: SimulatedModel, name: str, values: ValueOf) -> ir.Value:
    """A layer's weight, dequantized where it is quantized, with the axes that what holds it has."""
    layer, stored = simulated.floats.layers[name], f"{name}.weight"
    if name not in simulated.weights:
        return editor.initializer(stored, simulated.floats[name].detach().numpy())
    value = values(name)
    held = None if layer.parameter is None else simulated.floats.tensor(layer.parameter)
    size, order = _in_memory(layer)
    size, made = size or (layer.shape if held is None else tuple(held.shape)), layer.shape

    if order is not None:
        turned = tuple(size[axis] for axis in order)
        value = _reshaped(editor, before, value, stored, made, turned)
        back = sorted(range(len(size)), key=order.__getitem__)
        value, made = editor.node(before, "Transpose", [value], stored, perm=back), size

    # a layer alone in a parameter may see more axes than that has: a transposed convolution sees its groups
    if held is not None and math.prod(size) == held.numel():
        size = tuple(held.shape)
    return _reshaped(editor, before, value, stored, made, size)


def _reshaped(
    editor: Editor, before: ir.Node, value: ir.Value, name: str, made: tuple[int, ...], wanted: tuple[int, ...]
) -> ir.Value:
    if made == wanted:
        return value
    shape = editor.initializer(f"{name}.shape", np.array(wanted, np.int64))
    return editor.node(before, "Reshape", [value, shape], name)
