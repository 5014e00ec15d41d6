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
from quantkit.backends.onnxruntime.weight_forms import StoredCodes, dequantized
from quantkit.program.layers import LayerWeight, Weights
from quantkit.simulation.model import SimulatedModel

# A layer's name -> its codes, output channels first
CodesOf = Callable[[str], StoredCodes]


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
        held = None if layer.parameter is None else floats.tensor(layer.parameter)
        return _size(layer, None) if held is None else tuple(held.shape)


def held_in(simulated: SimulatedModel, name: str) -> Held | None:
    """What a mark of this name holds, where some of it is quantized; None where nothing is, and where layers are not
    all of it.
    """
    floats, coded = simulated.floats, simulated.weights
    layer = floats.layers.get(name)
    if layer is not None and (layer.parameter is None or _is_whole(layer)):
        return _alone(name, layer) if name in coded else None
    inside = [n for n, weight in floats.layers.items() if weight.parameter == name]
    if coded.keys().isdisjoint(inside) or name not in floats.covered(inside):
        return None
    if len(inside) == 1:
        return _alone(inside[0], floats.layers[inside[0]])
    inside.sort(key=lambda n: region.offset if (region := floats.layers[n].region) is not None else 0)
    if not _rows_follow(floats, name, inside):
        return None
    return Held(tuple(inside), plain=coded.keys() >= set(inside))


def _is_whole(layer: LayerWeight) -> bool:
    return layer.region is None and layer.order is None


def _alone(name: str, layer: LayerWeight) -> Held:
    whole = layer.parameter is None or layer.region is None
    if layer.order is None or not whole:
        return Held((name,), plain=whole)
    turned = len(layer.shape) == 2 and layer.order == (1, 0)
    return Held((name,), plain=turned, turned=turned)


def _rows_follow(floats: Weights, parameter: str, layers: list[str]) -> bool:
    """Whether layers are slices of a parameter along its first axis, one after the other."""
    held, start = floats.tensor(parameter), 0
    for layer in map(floats.layers.__getitem__, layers):
        region = layer.region
        if region is None or layer.order is not None or region.offset != start:
            return False
        if region.stride != held.stride() or region.size[1:] != tuple(held.shape[1:]):
            return False
        start += region.size[0] * region.stride[0]
    return True


def composed(editor: Editor, before: ir.Node, simulated: SimulatedModel, held: Held, codes: CodesOf) -> ir.Value:
    """The float32 value that holds layers, from the ``codes`` of those that have some."""
    parts = [_laid_out(editor, before, simulated, name, codes) for name in held.layers]
    return parts[0] if len(parts) == 1 else editor.node(before, "Concat", parts, f"{held.name}.weight", axis=0)


def _laid_out(editor: Editor, before: ir.Node, simulated: SimulatedModel, name: str, codes: CodesOf) -> ir.Value:
    """A layer's weight, dequantized where it has codes, with the axes that what holds it has."""
    layer, stored = simulated.floats.layers[name], f"{name}.weight"
    if name not in simulated.weights:
        return editor.initializer(stored, simulated.floats[name].detach().numpy())
    value = dequantized(editor, before, stored, simulated.weights[name], codes(name))
    held = None if layer.parameter is None else simulated.floats.tensor(layer.parameter)
    size, made = _size(layer, held), layer.shape

    if layer.order is not None:
        turned = tuple(size[axis] for axis in layer.order)
        value = _reshaped(editor, before, value, stored, made, turned)
        back = sorted(range(len(size)), key=layer.order.__getitem__)
        value, made = editor.node(before, "Transpose", [value], stored, perm=back), size

    # a layer alone in a parameter may see more axes than that has: a transposed convolution sees its groups
    if held is not None and math.prod(size) == held.numel():
        size = tuple(held.shape)
    return _reshaped(editor, before, value, stored, made, size)


def _size(layer: LayerWeight, held: Tensor | None) -> tuple[int, ...]:
    """The shape in which a layer's weight is read, before its axes are put in order."""
    if layer.region is not None:
        return layer.region.size
    return layer.shape if held is None else tuple(held.shape)


def _reshaped(
    editor: Editor, before: ir.Node, value: ir.Value, name: str, made: tuple[int, ...], wanted: tuple[int, ...]
) -> ir.Value:
    if made == wanted:
        return value
    shape = editor.initializer(f"{name}.shape", np.array(wanted, np.int64))
    return editor.node(before, "Reshape", [value, shape], name)
