"""Changing an ONNX graph: nodes and initializers with names that follow the model's modules, and nothing left over."""

from __future__ import annotations

import ast
import itertools
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

from quantkit.backends.onnxruntime.marks import DOMAIN, OPSET, MarkedGraph
from quantkit.backends.onnxruntime.replayed import SCOPES

_SCOPES = "pkg.torch.onnx.name_scopes"
_WRAPPER = "model"


class Editor:
    """Adds nodes and initializers to a graph and takes nodes out of it."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.node_names = {node.name for node in graph}

    def initializer(self, name: str, data: np.ndarray | ir.TensorProtocol) -> ir.Value:
        """The initializer of this name with this data; where the name holds other data, one named ``<name>.1``."""
        tensor = ir.tensor(data) if isinstance(data, np.ndarray) else data
        for count in itertools.count():
            own = f"{name}.{count}" if count else name
            if own not in self.graph.initializers:
                value = ir.Value(name=own, const_value=tensor)
                self.graph.register_initializer(value)
                return value
            if _equal(self.graph.initializers[own].const_value, tensor):
                return self.graph.initializers[own]
        raise AssertionError("unreachable")

    def set_aside(self, original: ir.Value | None) -> None:
        """Free an initializer's name for its quantized form; once nothing reads it, it is dropped."""
        if original is not None and original.is_initializer():
            original.name = unused_name(f"{original.name}.float", set(self.graph.initializers))

    def node(
        self,
        before: ir.Node,
        op: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """The output of a new node ``<name>/<op>`` placed ahead of ``before``."""
        made = ir.node(op, inputs, attributes, domain=domain)
        made.name = unused_name(f"{name}/{op}", self.node_names)
        made.outputs[0].name = made.name
        self.graph.insert_before(before, made)
        return made.outputs[0]

    def replace(self, node: ir.Node, value: ir.Value) -> None:
        """Let everything that reads a node's output read ``value``, and take the node out.

        A graph output keeps its name and type: ``value`` takes them over, or a copy of it where it has a name to keep.
        """
        old = node.outputs[0]
        if old.is_graph_output():
            if value.is_graph_output() or value.is_graph_input() or value.is_initializer():
                value = self.node(node, "Identity", [value], str(old.name))
            old.name, value.name = f"{node.name}/replaced", old.name
            value.shape, value.type = old.shape, old.type
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)

    def bypass(self, node: ir.Node) -> None:
        """Take a node out: what read its output reads its first input."""
        source = node.inputs[0]
        assert source is not None
        self.replace(node, source)


def _equal(one: ir.TensorProtocol | None, other: ir.TensorProtocol) -> bool:
    return (
        one is not None
        and one.dtype == other.dtype
        and tuple(one.shape) == tuple(other.shape)
        and one.tobytes() == other.tobytes()
    )


def unused_name(name: str, taken: set[Any]) -> str:
    """``name``, or with ``.1``, ``.2``, ... where it is taken; the result is taken afterwards."""
    count, free = 0, name
    while free in taken:
        count += 1
        free = f"{name}.{count}"
    taken.add(free)
    return free


def copy_tidy(marked: MarkedGraph) -> ir.Model:
    """A copy of a marked graph named after the model: nodes ``<module>/<op>``, initializers as in its state."""
    model = marked.model.clone()
    graph = model.graph
    OutputFixPass()(model)
    _copy_constant_outputs(graph)
    taken: set[Any] = {*marked.inputs, *marked.outputs}
    for value, name in zip(graph.inputs, marked.inputs, strict=True):
        value.name = name
    # In the graph's order, so that the file is the same in every process.
    state, constants = list[ir.Value](), list[ir.Value]()
    for value in graph.initializers.values():
        (state if str(value.name).startswith(f"{_WRAPPER}.") else constants).append(value)
    for value in state:
        value.name = unused_name(str(value.name).removeprefix(f"{_WRAPPER}."), taken)
    _name_nodes(graph, taken)
    for value in constants:
        value.name = unused_name(_role(value), taken)
    for value, name in zip(graph.outputs, marked.outputs, strict=True):
        value.name = name
    _name_sizes(graph, marked)
    ClearMetadataAndDocStringPass()(model)
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
    for value in graph.initializers.values():
        value.shape = value.type = None  # the tensor knows them
    return model


def _copy_constant_outputs(graph: ir.Graph) -> None:
    """Let the graph return copies of the constants that it returns, as a model returns anchors or scales."""
    for i, value in enumerate(graph.outputs):
        if value.is_initializer():
            node = ir.node("Identity", [value])
            node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
            graph.append(node)
            graph.outputs[i] = node.outputs[0]


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
    if scope in (_WRAPPER, SCOPES):
        return ""
    return scope.removeprefix(f"{_WRAPPER}.").removeprefix(f"{SCOPES}.")


def _role(constant: ir.Value) -> str:
    """What the first reader of a constant calls it, e.g. ``layer1/Slice.starts``; a mark by the name it remembers."""
    use = min(constant.uses(), key=lambda use: str(use.node.name))
    if use.node.domain == DOMAIN:
        return f"{use.node.attributes['name'].as_string()}.value"
    inputs = defs.get_schema(use.node.op_type, OPSET, use.node.domain).inputs
    return f"{use.node.name}.{inputs[min(use.idx, len(inputs) - 1)].name}"


def _name_sizes(graph: ir.Graph, marked: MarkedGraph) -> None:
    """Call the exporter's symbols what the sizes of inputs are called; a size computed from them is left open."""
    named = marked.taken.by_input()
    names: dict[str, str] = {}
    for value in graph.inputs:
        for axis, name in named.get(str(value.name), {}).items():
            assert value.shape is not None
            names.setdefault(str(value.shape[axis]), name)
            value.shape[axis] = ir.SymbolicDim(name)
    for value in graph.outputs:
        if value.shape is not None:
            value.shape = ir.Shape(
                [dim if isinstance(dim, int) else ir.SymbolicDim(names.get(str(dim))) for dim in value.shape]
            )


def remove_leftovers(model: ir.Model) -> None:
    """Drop nodes, initializers and operator sets that nothing uses any more."""
    RemoveUnusedNodesPass()(model)
    RemoveUnusedOpsetsPass()(model)
