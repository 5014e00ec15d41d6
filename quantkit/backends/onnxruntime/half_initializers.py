"""What stays float, stored as float16 in the file: widened when onnxruntime loads it, tables row by row as they are
looked up.

Values decide: an initializer is float16 where that holds it exactly, as it does what simulation computes with, however
the exporter has laid it out.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir
import torch

from quantkit.backends.onnxruntime.editing import Editor
from quantkit.backends.onnxruntime.weight_forms import picks_rows, widened, widened_rows
from quantkit.numbers.half import is_half_exactly


def store_as_halves(graph: ir.Graph, floats: Iterable[ir.Value]) -> None:
    """Store these initializers as float16 where nothing is lost by it."""
    editor = Editor(graph)
    for value in floats:
        if value.is_graph_output() or not value.uses() or not _is_half(value.const_value):
            continue
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy().astype("float16"), name=value.name)
        name = str(value.name)
        whole: ir.Value | None = None
        for call, position in [(use.node, use.idx) for use in value.uses()]:
            if position == 0 and picks_rows(call) and call.graph is graph:
                editor.replace(call, widened_rows(editor, call, name, value))
                continue
            whole = whole or widened(editor, graph[0], name, value)
            call.replace_input_with(position, whole)


def _is_half(held: ir.TensorProtocol | None) -> bool:
    if held is None or held.dtype != ir.DataType.FLOAT:
        return False
    return is_half_exactly(torch.from_numpy(held.numpy().copy()))
