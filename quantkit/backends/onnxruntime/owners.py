"""Which part of a model each node of a graph belongs to, in the file as written and as onnxruntime rewrites it.

onnxruntime fuses nodes, renames them, and adds some that convert or change the layout of tensors. What it keeps is the
beginning of a name; what it adds has a maker further up, and belongs to the site whose tensor it handles.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from quantkit.backends.onnxruntime.editing import copy_tidy
from quantkit.backends.onnxruntime.marks import MarkedGraph, marks
from quantkit.plan.operations import Operation

_ADDED = re.compile(r"(_nchwc|_nhwc|_token_\d+|/[A-Z]\w*Fusion|/duplicated)$")
_CONVERSIONS = ("/QuantizeLinear", "/DequantizeLinear")
_HANDLING = frozenset(
    "Transpose ReorderInput ReorderOutput QuantizeLinear DequantizeLinear Slice Pad Reshape Flatten Squeeze Unsqueeze "
    "Identity MaxPool Cast Gather Split Expand".split()
)


@dataclass(frozen=True)
class Owners:
    """Names of written nodes -> operation they belong to; operation -> site it writes; ``inputs``: graph input ->
    site.
    """

    operations: Mapping[str, str]
    writes: Mapping[str, str]
    sites: frozenset[str]
    inputs: Mapping[str, str]

    def operation(self, name: str) -> str | None:
        """The operation a node belongs to, by its name without what onnxruntime added."""
        while name not in self.operations:
            shorter = _ADDED.sub("", name)
            if shorter == name:
                return self.operations.get(_scope(name))  # what dequantizes its weight or bias
            name = shorter
        return self.operations[name]

    def converted(self, name: str) -> str | None:
        """The site that a written conversion belongs to."""
        while (shorter := _ADDED.sub("", name)) != name:
            name = shorter
        base = next((name[: name.rindex(end)] for end in _CONVERSIONS if end in name), None)
        return base if base in self.sites else None


def owners_of(marked: MarkedGraph, operations: Sequence[Operation], places: Mapping[str, str]) -> Owners:
    """The owners of a marked graph's nodes. ``places``: place of a site's maker -> site."""
    graph = copy_tidy(marked).graph
    layers = {op.name for op in operations if op.kind == "layer"}
    maker = {site: op for op in operations if op.kind != "float" for site in op.writes}
    owner = {str(n.name): scope for n in graph if (scope := _scope(str(n.name))) in layers and not _is_mark(n)}
    owner |= {f"{name}.{part}": name for name in layers for part in ("weight", "bias")}
    inputs = {}
    for name, mark in marks(graph, "Site"):
        if mark.attributes["place"].as_string() not in places:
            continue
        value = mark.inputs[0]
        if value is not None and value.is_graph_input():
            inputs[str(value.name)] = name
        if name in maker:
            owner |= dict.fromkeys(_made_by(mark, maker[name], owner), maker[name].name)
    writes = {op.name: site for site, op in maker.items()}
    return Owners(owner, writes, frozenset(places.values()), inputs)


def _scope(name: str) -> str:
    return name.rpartition("/")[0]


def _is_mark(node: ir.Node) -> bool:
    return node.op_type in ("Site", "Weight")


def _made_by(mark: ir.Node, maker: Operation, layers: Mapping[str, str]) -> list[str]:
    """Names of the nodes of an operation: back from the mark of what it writes, through what was fused into it."""
    names: list[str] = []
    node = mark.inputs[0].producer() if mark.inputs[0] is not None else None
    while node is not None and not _is_mark(node):
        if layers.get(str(node.name)) == maker.name:
            return names
        names.append(str(node.name))
        data = [v for v in node.inputs if v is not None and not v.is_initializer() and v.const_value is None]
        if len(data) != 1:
            return names if maker.kind == "integer" else []
        node = data[0].producer()
    return []


def owners_of_nodes(graph: onnx.GraphProto, owners: Owners) -> dict[str, tuple[str, str]]:
    """("operation", name), ("site", name) or ("rest", "") of every node, by its name, of a graph that onnxruntime
    rewrote.
    """
    producer = {output: node for node in graph.node for output in node.output}

    def site_of(value: str) -> str | None:
        """The site whose tensor a value is: that of the operation it comes from."""
        while True:
            if value in owners.inputs:
                return owners.inputs[value]
            node = producer.get(value)
            if node is None:
                return None
            if (site := owners.converted(node.name)) is not None:
                return site
            if (operation := owners.operation(node.name)) is not None:
                return owners.writes.get(operation)
            if node.op_type not in _HANDLING or not node.input:
                return None
            value = node.input[0]

    found = {}
    for node in graph.node:
        operation = owners.operation(node.name)
        if operation is not None:
            found[node.name] = ("operation", operation)
            continue
        site = owners.converted(node.name)
        if site is None and node.op_type in _HANDLING and node.input:
            site = site_of(node.input[0])
        found[node.name] = ("rest", "") if site is None else ("site", site)
    return found
