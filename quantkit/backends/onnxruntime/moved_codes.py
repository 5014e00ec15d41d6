"""Operations that only move values move codes instead: no trip through float between a site and its echo.

onnxruntime does this by itself around pooling and reshaping but not around padding, which would keep the operand of a
residual add in float.
"""

from __future__ import annotations

import onnx_ir as ir

_MOVES = frozenset(("Slice", "Pad", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"))
_PAD_VALUE = 2  # position of Pad's fill value; absent it is 0, which as a code is the zero point


def move_codes(graph: ir.Graph) -> None:
    """Where values are dequantized, moved and quantized again by the same scale and zero point, move the codes."""
    for echo in [node for node in graph if node.op_type == "QuantizeLinear"]:
        source, steps = _way_back(echo.inputs[0])
        if source is None or source.op_type != "DequantizeLinear" or source.inputs[1:] != echo.inputs[1:]:
            continue
        codes = source.inputs[0]
        for step in reversed(steps):
            step.replace_input_with(0, codes)
            if step.op_type == "Pad":
                _pad_with(step, echo.inputs[2])
            codes = step.outputs[0]
        assert codes is not None
        ir.convenience.replace_all_uses_with(echo.outputs[0], codes)
        graph.remove(echo, safe=True)


def _way_back(value: ir.Value | None) -> tuple[ir.Node | None, list[ir.Node]]:
    """The node that made what ``value`` holds, and the moves in between, last first; nothing else reads these."""
    steps: list[ir.Node] = []
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in _MOVES and _is_private(node.outputs[0]):
        steps.append(node)
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return node, steps


def _is_private(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def _pad_with(pad: ir.Node, code: ir.Value | None) -> None:
    if len(pad.inputs) <= _PAD_VALUE:
        pad.resize_inputs(_PAD_VALUE + 1)
    pad.replace_input_with(_PAD_VALUE, code)
