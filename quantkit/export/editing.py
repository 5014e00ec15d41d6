"""Changing an ONNX graph: nodes and initializers with names that follow the model's modules, and nothing left over."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx import defs
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    OutputFixPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)

from quantkit.export.marks import BATCH, OPSET, MarkedGraph

_SCOPES = "pkg.torch.onnx.name_scopes"
_WRAPPER = "model"


class Editor:
    """Adds nodes and initializers to a graph. Equal initializers of one name are shared."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.node_names = {node.name for node in graph}

    def initializer(self, name: str, data: np.ndarray | ir.TensorProtocol) -> ir.Value:
        """The initializer of this name, made from ``data`` on first use."""
        if name not in self.graph.initializers:
            tensor = ir.tensor(data) if isinstance(data, np.ndarray) else data
            value = ir.Value(name=name, const_value=tensor)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def node(
        self, before: ir.Node, op: str, inputs: Sequence[ir.Value | None], name: str, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """The output of a new node ``<name>/<op>`` placed ahead of ``before``."""
        made = ir.node(op, inputs, attributes, domain=domain)
        made.name = unused_name(f"{name}/{op}", self.node_names)
        made.outputs[0].name = made.name
        self.graph.insert_before(before, made)
        return made.outputs[0]


def unused_name(name: str, taken: set[Any]) -> str:
    """``name``, or with ``.1``, ``.2``, ... where it is taken; the result is taken afterwards."""
    count, free = 0, name
    while free in taken:
        count += 1
        free = f"{name}.{count}"
    taken.add(free)
    return free


def copy_tidy(marked: MarkedGraph) -> ir.Model:
    """A copy of a marked graph named after the model: nodes ``<module>/<op>``, initializers as in the model's state."""
    model = marked.model.clone()
    graph = model.graph
    OutputFixPass()(model)
    taken: set[Any] = {*marked.inputs, *marked.outputs}
    for value, name in zip(graph.inputs, marked.inputs, strict=True):
        value.name = name
    state = [v for v in graph.initializers.values() if str(v.name).startswith(f"{_WRAPPER}.")]
    for value in state:
        value.name = unused_name(str(value.name).removeprefix(f"{_WRAPPER}."), taken)
    _name_nodes(graph, taken)
    for value in set(graph.initializers.values()) - set(state):
        value.name = unused_name(_role(value), taken)
    for value, name in zip(graph.outputs, marked.outputs, strict=True):
        value.name = name
    _name_batch(graph, marked)
    ClearMetadataAndDocStringPass()(model)
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
    for value in graph.initializers.values():
        value.shape = value.type = None  # the tensor knows them
    return model


def _name_nodes(graph: ir.Graph, taken: set[Any]) -> None:
    """Name every node by its module and operation, and its outputs after it; intermediate shapes are dropped."""
    for node in graph:
        node.name = unused_name(f"{_scope(node)}/{node.op_type}", taken)
        for i, value in enumerate(node.outputs):
            value.name = f"{node.name}:{i}" if i else node.name
            if not value.is_graph_output():
                value.shape = value.type = None


def _scope(node: ir.Node) -> str:
    """The name of the module a node was made in."""
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    scope = scopes[-2] if len(scopes) > 1 else ""
    return "" if scope == _WRAPPER else scope.removeprefix(f"{_WRAPPER}.")


def _role(constant: ir.Value) -> str:
    """What the first reader of a constant calls it, e.g. ``layer1/Slice.starts``."""
    use = min(constant.uses(), key=lambda use: str(use.node.name))
    inputs = defs.get_schema(use.node.op_type, OPSET, use.node.domain).inputs
    return f"{use.node.name}.{inputs[min(use.idx, len(inputs) - 1)].name}"


def _name_batch(graph: ir.Graph, marked: MarkedGraph) -> None:
    """Call the exporter's symbol for the batch dimension ``batch`` wherever it stands alone; drop what is computed from it."""
    symbols = {value.shape[0] for value in graph.inputs if value.name in marked.dynamic}
    for value in (*graph.inputs, *graph.outputs):
        dims = [d if isinstance(d, int) else ir.SymbolicDim(BATCH if d in symbols else None) for d in value.shape]
        value.shape = ir.Shape(dims)


def remove_leftovers(model: ir.Model) -> None:
    """Drop nodes, initializers and operator sets that nothing uses any more."""
    RemoveUnusedNodesPass()(model)
    RemoveUnusedOpsetsPass()(model)
