"""Weights that lie in a graph otherwise than as output channels first: projections packed into one parameter, experts
held in three dimensions, weights that the model computes.

Each layer's codes are stored as those of any other, dequantized, and laid out as the graph reads them by operators on
constants, which onnxruntime carries out once, when it loads the file.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from quantkit.backends.onnxruntime.editing import Editor
from quantkit.backends.onnxruntime.weight_forms import WeightForm, stored_codes
from quantkit.numbers.uniform import QuantizedWeight
from quantkit.program.layers import Weights
from quantkit.simulation.model import SimulatedModel


def layers_marked(simulated: SimulatedModel, name: str) -> list[str]:
    """The quantized layers whose weights a mark of this name holds in parts, turned, or computed; none where a layer
    reads the whole of a parameter, and where they are not all of it.
    """
    floats = simulated.floats
    if name in floats.layers:
        return [name] if floats.layers[name].parameter is None and name in simulated.weights else []
    held = [n for n, weight in floats.layers.items() if weight.parameter == name and n in simulated.weights]
    if name not in floats.covered(held) or not _rows_follow(floats, held):
        return []
    return sorted(held, key=lambda n: 0 if (region := floats.layers[n].region) is None else region.offset)


def _rows_follow(floats: Weights, layers: Sequence[str]) -> bool:
    """Whether layers are rows of one matrix, one after the other, or one layer alone."""
    weights = [floats.layers[name] for name in layers]
    return len(weights) == 1 or all(weight.order is None and len(weight.shape) == 2 for weight in weights)


def composed(editor: Editor, before: ir.Node, simulated: SimulatedModel, layers: Sequence[str]) -> ir.Value:
    """The float32 value of what holds ``layers``, from their codes."""
    parts = [_laid_out(editor, before, name, simulated) for name in layers]
    return parts[0] if len(parts) == 1 else editor.node(before, "Concat", parts, f"{layers[0]}.weights", axis=0)


def _laid_out(editor: Editor, before: ir.Node, name: str, simulated: SimulatedModel) -> ir.Value:
    """A layer's dequantized weight, with the axes that what holds it has."""
    layer, stored = simulated.floats.layers[name], f"{name}.weight"
    value = _dequantized(editor, before, stored, simulated.weights[name])
    if layer.order is None:
        return value
    held = simulated.floats.tensor(layer.parameter).shape if layer.region is None and layer.parameter else None
    size = tuple(held) if held is not None else layer.region.size if layer.region is not None else layer.shape
    turned = [size[axis] for axis in layer.order]
    if tuple(turned) != layer.shape:
        shape = editor.initializer(f"{stored}.shape", np.array(turned, np.int64))
        value = editor.node(before, "Reshape", [value, shape], stored)
    back = sorted(range(len(size)), key=layer.order.__getitem__)
    return editor.node(before, "Transpose", [value], stored, perm=back)


def _dequantized(editor: Editor, before: ir.Node, stored: str, weight: QuantizedWeight) -> ir.Value:
    value = stored_codes(editor, before, stored, weight.codes, WeightForm(weight.format.bits))
    across = [-1, *[1] * (weight.codes.dim() - 1)]
    scale = editor.initializer(f"{stored}.scale", weight.scale.reshape(across).numpy())
    value = editor.node(before, "Cast", [value], stored, to=ir.DataType.FLOAT)
    return editor.node(before, "Mul", [value, scale], stored)
