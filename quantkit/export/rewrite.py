"""From marks to integers: sites become QuantizeLinear and DequantizeLinear, weights their stored codes, biases INT32."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from quantkit.errors import InvalidRequest
from quantkit.export.editing import Editor, unused_name
from quantkit.export.marks import DOMAIN, bypass, marks
from quantkit.export.moves import move_codes
from quantkit.export.weights import add_functions, stored_codes
from quantkit.kernels.reference import QuantizedWeight, SiteRange
from quantkit.quantizers.simulate import SimulatedModel

_BIASED = ("Conv", "Gemm")  # their third input is a bias that integer kernels take as INT32
_INT32 = torch.iinfo(torch.int32)


def bypass_marks(graph: ir.Graph) -> None:
    """Take all marks out: the float graph."""
    for kind in ("Site", "Weight"):
        for _, mark in marks(graph, kind):
            bypass(mark)


def quantize_marks(model: ir.Model, simulated: SimulatedModel) -> None:
    """Turn the marks of ``simulated``'s layers and sites into integers and take the others out.

    Raises InvalidRequest for formats that have no ONNX form yet.
    """
    for name, weight in simulated.weights.items():
        _require_form(name, weight)
    for name, site in simulated.ranges.items():
        if site.bits != 8:
            raise InvalidRequest(f"Site {name!r} has {site.bits}-bit codes; ONNX files carry 8-bit activations so far.")
    graph = model.graph
    writer = _Writer(graph, simulated)
    for name, mark in marks(graph, "Weight"):
        if name in simulated.weights:
            writer.quantize_weight(name, mark)
        else:
            bypass(mark)
    for name, mark in marks(graph, "Site"):
        if name in simulated.ranges:
            writer.quantize_site(name, mark)
        else:
            bypass(mark)
    move_codes(graph)
    add_functions(model)


def _require_form(name: str, weight: QuantizedWeight) -> None:
    fmt = weight.format
    if not fmt.is_integer or fmt.bits > 8 or weight.scale.shape[1] != 1 or fmt.zero_point or fmt.scale != "f32":
        raise InvalidRequest(
            f"Layer {name!r} has weight format {fmt}, which ONNX files do not carry yet. "
            "Use 2 to 8 bits per output channel without zero points, such as w4."
        )


class _Writer:
    """Replaces marks one by one; what two calls of a layer or two echoes of a site share is written once."""

    def __init__(self, graph: ir.Graph, simulated: SimulatedModel) -> None:
        self.graph = graph
        self.editor = Editor(graph)
        self.simulated = simulated
        self.weights: dict[tuple[str, bool, bool], ir.Value] = {}
        self.biases: dict[tuple[str, str], ir.Value] = {}

    def quantize_site(self, name: str, mark: ir.Node) -> None:
        site = self.simulated.ranges[name]
        scale = self.editor.initializer(f"{name}.scale", np.array(site.scale, np.float32))
        zero = self.editor.initializer(f"{name}.zero_point", np.array(site.zero_point, np.uint8))
        codes = self.editor.node(mark, "QuantizeLinear", [mark.inputs[0], scale, zero], name)
        self._replace(mark, self.editor.node(mark, "DequantizeLinear", [codes, scale, zero], name))

    def quantize_weight(self, name: str, mark: ir.Node) -> None:
        """Write a layer's codes, transposed where the graph transposes the weight, and the biases of the calls that read them."""
        self._set_aside(mark.inputs[0])
        readers = [use.node for use in mark.outputs[0].uses()]
        turns = [n for n in readers if n.op_type == "Transpose" and n.attributes["perm"].as_ints() == (1, 0)]
        transposed = bool(turns) and len(turns) == len(readers)
        ends = turns if transposed else [mark]
        calls = [use.node for end in ends for use in end.outputs[0].uses()]
        site = self._input_site(calls)
        value = self._weight(name, mark, transposed, integer=site is not None)
        for end in ends:
            self._replace(end, value)
        if transposed:
            self.graph.remove(mark, safe=True)
        for call in calls:
            if site is not None and call.op_type in _BIASED and len(call.inputs) > 2:
                self._quantize_bias(name, call, *site)

    def _weight(self, name: str, before: ir.Node, transposed: bool, integer: bool) -> ir.Value:
        """A layer's weight as float32: dequantized where kernels take codes, multiplied out at load where they do not."""
        key = (name, transposed, integer)
        if key not in self.weights:
            weight, stored = self.simulated.weights[name], f"{name}.weight"
            codes = weight.codes.t().contiguous() if transposed else weight.codes
            axis = 1 if transposed else 0
            value = stored_codes(self.editor, before, stored, codes, weight.format.bits)
            if integer:
                scale = self.editor.initializer(f"{stored}.scale", weight.scale.reshape(-1).numpy())
                zeros = self.editor.initializer(f"zeros{len(weight.scale)}", np.zeros(len(weight.scale), np.int8))
                value = self.editor.node(before, "DequantizeLinear", [value, scale, zeros], stored, axis=axis)
            else:
                across = [1] * codes.dim()
                across[axis] = -1
                scale = self.editor.initializer(f"{stored}.scale", weight.scale.reshape(across).numpy())
                value = self.editor.node(before, "Cast", [value], stored, to=ir.DataType.FLOAT)
                value = self.editor.node(before, "Mul", [value, scale], stored)
            self.weights[key] = value
        return self.weights[key]

    def _input_site(self, calls: list[ir.Node]) -> tuple[str, SiteRange] | None:
        """The site a layer's call reads, when all readers of the weight are one call and its input is quantized."""
        if len(calls) != 1 or calls[0].inputs[0] is None:
            return None
        made = calls[0].inputs[0].producer()
        if made is None or made.domain != DOMAIN or made.op_type != "Site":
            return None
        name = made.attributes["name"].as_string()
        return (name, self.simulated.ranges[name]) if name in self.simulated.ranges else None

    def _quantize_bias(self, name: str, call: ir.Node, site_name: str, site: SiteRange) -> None:
        bias = call.inputs[2]
        if bias is None or bias.const_value is None:
            return
        if (name, site_name) not in self.biases:
            self._set_aside(bias)
            step = site.scale * self.simulated.weights[name].scale.reshape(-1)
            codes = torch.round(torch.from_numpy(bias.const_value.numpy()) / step)
            codes = codes.double().clamp(_INT32.min, _INT32.max).to(torch.int32)
            stored = unused_name(f"{name}.bias", set(self.graph.initializers))
            parts = [self.editor.initializer(stored, codes.numpy()), self.editor.initializer(f"{stored}.scale", step.numpy())]
            self.biases[name, site_name] = self.editor.node(call, "DequantizeLinear", parts, stored, axis=0)
        call.replace_input_with(2, self.biases[name, site_name])

    def _replace(self, node: ir.Node, value: ir.Value) -> None:
        ir.convenience.replace_all_uses_with(node.outputs[0], value, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)

    def _set_aside(self, original: ir.Value | None) -> None:
        """Free an initializer's name for its quantized form; once nothing reads it, it is dropped."""
        if original is not None and original.is_initializer():
            taken = set(self.graph.initializers)
            original.name = unused_name(f"{original.name}.float", taken)
