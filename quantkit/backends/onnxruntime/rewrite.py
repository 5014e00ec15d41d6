"""From marks to integers: QuantizeLinear and DequantizeLinear at sites, stored codes for weights, INT32 biases."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from quantkit.backends.onnxruntime.composed_weights import composed, layers_marked
from quantkit.backends.onnxruntime.editing import Editor
from quantkit.backends.onnxruntime.marks import DOMAIN, marks
from quantkit.backends.onnxruntime.moved_codes import move_codes
from quantkit.backends.onnxruntime.token_forms import Tokens, reads_rows, token_product, token_values
from quantkit.backends.onnxruntime.weight_forms import (
    LARGEST_UNPACKED,
    WeightForm,
    add_functions,
    stored_codes,
)
from quantkit.errors import InvalidRequest
from quantkit.numbers.logarithmic import LogRange
from quantkit.numbers.per_token import TokenRange
from quantkit.numbers.uniform import QuantizedWeight, SiteRange
from quantkit.program.sites import coded_sites
from quantkit.simulation.model import SimulatedModel
from quantkit.targets.instruction_sets import VNNI

BYTE = 8  # bits of a code as kernels read it
_BIAS = 2  # its position among the inputs of Conv and Gemm
_INT32 = torch.iinfo(torch.int32)


def bypass_marks(graph: ir.Graph) -> None:
    """Take all marks out: the float graph."""
    editor = Editor(graph)
    for kind in ("Site", "Weight"):
        for _, mark in marks(graph, kind):
            editor.bypass(mark)


def quantize_marks(model: ir.Model, simulated: SimulatedModel, instruction_set: str) -> None:
    """Turn the marks of ``simulated``'s layers and sites into integers and take the others out. ``instruction_set``:
    of the CPUs that the file is for.

    Raises InvalidRequest for formats that have no ONNX form yet.
    """
    for name, weight in simulated.weights.items():
        _require_form(name, weight)
    for name, site in simulated.ranges.items():
        if site.kind not in _SITE_FORMS:
            raise InvalidRequest(
                f"Site {name!r} has {site.kind} codes; ONNX files have forms for {', '.join(_SITE_FORMS)} ones."
            )
        if site.bits > BYTE:
            raise InvalidRequest(f"Site {name!r} has {site.bits}-bit codes; ONNX files carry up to 8 bits.")
    graph = model.graph
    writer = _Writer(graph, simulated, instruction_set)
    for name, mark in marks(graph, "Weight"):
        if layers := layers_marked(simulated, name):
            writer.compose_weight(layers, mark)
        elif name in simulated.weights:
            writer.quantize_weight(name, mark)
        else:
            writer.editor.bypass(mark)
    for name, mark in marks(graph, "Site"):
        if writer.is_coded(mark):
            writer.quantize_site(name, mark)
        else:
            writer.editor.bypass(mark)
    move_codes(graph)
    add_functions(model)


def _require_form(name: str, weight: QuantizedWeight) -> None:
    fmt = weight.format
    if not fmt.is_integer or fmt.bits > 8 or weight.scale.shape[1] != 1 or fmt.zero_point or fmt.scale != "f32":
        raise InvalidRequest(
            f"Layer {name!r} has weight format {fmt}, which ONNX files do not carry yet. "
            "Use 2 to 8 bits per output channel without zero points, such as w4."
        )
    in_planes = fmt.bits not in (4, 8)
    if in_planes and weight.codes.numel() > LARGEST_UNPACKED:
        raise InvalidRequest(
            f"Layer {name!r} has {weight.codes.numel():,} weights of {fmt.bits} bits; onnxruntime expands at most "
            f"{LARGEST_UNPACKED:,} when it loads a file and would expand more on every run. Give it 4 or 8 bits."
        )


def _reads(mark: ir.Node) -> list[tuple[Any, bool]]:
    """The uses of a marked weight, and whether each reads it transposed."""
    reads = []
    for use in mark.outputs[0].uses():
        if use.node.op_type == "Transpose" and tuple(use.node.attributes["perm"].as_ints()) == (1, 0):
            reads += [(turned, True) for turned in use.node.outputs[0].uses()]
        else:
            reads.append((use, False))
    return reads


def _channels_of_float_layer(node: ir.Node) -> int | None:
    """The input channels (axis 1) of a layer whose weight is a float initializer; None for other nodes, and for a
    single channel, which has but one scale.
    """
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or (weight := node.inputs[1]) is None:
        return None
    made, turned = weight.producer(), False
    if made is not None and made.op_type == "Transpose" and (weight := made.inputs[0]) is not None:
        turned = True
    if weight is None or weight.const_value is None:
        return None
    shape = weight.const_value.numpy().shape
    if node.op_type == "Conv":
        channels = shape[1] * (node.attributes["group"].as_int() if "group" in node.attributes else 1)
    elif node.op_type == "ConvTranspose":
        channels = shape[0]
    else:
        turned ^= "transB" in node.attributes and bool(node.attributes["transB"].as_int())
        channels = shape[1 if turned else 0]
    return int(channels) if channels > 1 else None


class _Writer:
    """Replaces marks one by one; what two calls of a layer or two echoes of a site share is written once."""

    def __init__(self, graph: ir.Graph, simulated: SimulatedModel, instruction_set: str) -> None:
        self.editor = Editor(graph)
        self.simulated = simulated
        self.instruction_set = instruction_set
        self.weights: dict[tuple[str, bool, bool], ir.Value] = {}
        self.biases: dict[tuple[str, str], ir.Value] = {}
        self.composed: dict[tuple[str, ...], ir.Value] = {}
        coded = coded_sites(simulated.sites, simulated.ranges)
        self.places = {str(place) for site in coded for place in (site.place, *site.echoes)}
        self.sites: dict[str, set[str | None]] = defaultdict(set)
        for name, mark in marks(graph, "Weight"):
            self.sites[name] |= {self._input_site(use.node) for use, _ in _reads(mark)}

    def is_coded(self, mark: ir.Node) -> bool:
        """Whether the simulated model has codes at this place."""
        return mark.attributes["place"].as_string() in self.places

    def quantize_site(self, name: str, mark: ir.Node) -> None:
        site = self.simulated.ranges[name]
        self.editor.replace(mark, _SITE_FORMS[site.kind](self, name, mark, site))

    def uniform_values(self, name: str, mark: ir.Node, site: SiteRange) -> ir.Value:
        """Codes and what they stand for, as a pair that onnxruntime fuses with its neighbours."""
        scale = self.editor.initializer(f"{name}.scale", np.array(site.scale, np.float32))
        zero = self.editor.initializer(f"{name}.zero_point", np.array(site.zero_point, np.uint8))
        codes = self.editor.node(mark, "QuantizeLinear", [mark.inputs[0], scale, zero], name)
        if site.bits < BYTE:  # bytes saturate at 255; clipping codes, not values, leaves the kernel before it integer
            highest = self.editor.initializer(f"{name}.highest", np.array(site.high, np.uint8))
            codes = self.editor.node(mark, "Clip", [codes, None, highest], name)
        self._dequantize_for_float_layers(name, mark, codes, site)
        return self.editor.node(mark, "DequantizeLinear", [codes, scale, zero], name)

    def row_values(self, name: str, mark: ir.Node, site: TokenRange) -> ir.Value:
        """Values on the grids of their rows; as they come where the layer that read them has integers."""
        source = mark.inputs[0]
        assert source is not None
        return token_values(self.editor, mark, Tokens(name, source, site)) if mark.outputs[0].uses() else source

    def log_values(self, name: str, mark: ir.Node, site: LogRange) -> ir.Value:
        """Logarithmic codes by operators that every runtime has, and their values looked up in a table."""

        def constant(role: str, value: float) -> ir.Value:
            return self.editor.initializer(f"{name}.{role}", np.array(value, np.float32))

        value = self.editor.node(mark, "Div", [mark.inputs[0], constant("scale", site.scale)], name)
        value = self.editor.node(mark, "Log", [value], name)
        value = self.editor.node(mark, "Mul", [value, constant("per_step", -2 / math.log(2))], name)
        value = self.editor.node(mark, "Round", [value], name)
        value = self.editor.node(mark, "Clip", [value, constant("lowest", 0), constant("highest", site.high)], name)
        codes = self.editor.node(mark, "Cast", [value], name, to=ir.DataType.INT32)
        table = self.editor.initializer(f"{name}.table", site.table().numpy())
        return self.editor.node(mark, "Gather", [table, codes], name, axis=0)

    def _dequantize_for_float_layers(self, name: str, mark: ir.Node, codes: ir.Value, site: SiteRange) -> None:
        """Give layers that stay float the same values with the scale written once per channel. Behind a single scale
        onnxruntime would take them for layers that were meant to be quantized, and round their weights itself, to 8
        bits with one scale for all of them.
        """
        made: dict[int, ir.Value] = {}
        for use in mark.outputs[0].uses():
            channels = _channels_of_float_layer(use.node) if use.idx == 0 else None
            if channels is None:
                continue
            if channels not in made:
                scales = self.editor.initializer(f"{name}.scales", np.full(channels, site.scale, np.float32))
                zeros = self.editor.initializer(f"{name}.zero_points", np.full(channels, site.zero_point, np.uint8))
                made[channels] = self.editor.node(mark, "DequantizeLinear", [codes, scales, zeros], name, axis=1)
            use.node.replace_input_with(0, made[channels])

    def compose_weight(self, layers: Sequence[str], mark: ir.Node) -> None:
        """Write the codes of layers that lie in one value otherwise than as they are read."""
        self.editor.set_aside(mark.inputs[0])
        key = tuple(layers)
        if key not in self.composed:
            self.composed[key] = composed(self.editor, mark, self.simulated, layers)
        self.editor.replace(mark, self.composed[key])

    def quantize_weight(self, name: str, mark: ir.Node) -> None:
        """Write a layer's codes, and the biases of the calls that read them. Where the graph transposes the weight,
        the codes are written transposed: onnxruntime does not fold a transposition of dequantized codes."""
        self.editor.set_aside(mark.inputs[0])
        for use, transposed in _reads(mark):
            tokens = self._tokens_of(use)
            if tokens is not None and reads_rows(use.node, transposed):
                weight, form = self.simulated.weights[name], self._integer_form(name)
                made = token_product(self.editor, use.node, name, tokens, weight, form)
                self.editor.replace(use.node, made)
                continue
            site = self._input_site(use.node)
            value = self._weight(name, use.node, transposed, integer=site is not None)
            use.node.replace_input_with(use.idx, value)
            if site is not None and self._has_integer_bias(name, use.node):
                use.node.replace_input_with(_BIAS, self._bias(name, use.node, site))

    def _integer_form(self, name: str) -> WeightForm:
        """The form of a layer's codes that integer kernels read fast and exactly with the instructions at hand."""
        bits = self.simulated.weights[name].format.bits
        return WeightForm(bits, unsigned=bits == 8 and self.instruction_set != VNNI)

    def _tokens_of(self, use: Any) -> Tokens | None:
        """The site of tokens that the call of a layer's weight reads."""
        mark = self._coded_mark(use.node) if use.idx == 1 else None
        if mark is None:
            return None
        name, value = mark.attributes["name"].as_string(), mark.inputs[0]
        found = self.simulated.ranges[name]
        return None if found.static or value is None else Tokens(name, value, found)

    def _coded_mark(self, call: ir.Node) -> ir.Node | None:
        """The mark of the site that a call reads first, where that has codes."""
        made = call.inputs[0].producer() if call.inputs[0] is not None else None
        is_site = made is not None and made.domain == DOMAIN and made.op_type == "Site"
        return made if made is not None and is_site and self.is_coded(made) else None

    def _weight(self, name: str, before: ir.Node, transposed: bool, integer: bool) -> ir.Value:
        """A layer's weight in float32: dequantized where kernels take codes, multiplied out at load where they do
        not."""
        key = (name, transposed, integer)
        if key not in self.weights:
            weight, stored = self.simulated.weights[name], f"{name}.weight"
            codes = weight.codes.t().contiguous() if transposed else weight.codes
            axis = 1 if transposed else 0
            form = self._integer_form(name) if integer else WeightForm(weight.format.bits)
            value = stored_codes(self.editor, before, stored, codes, form)
            if integer:
                scale = self.editor.initializer(f"{stored}.scale", weight.scale.reshape(-1).numpy())
                # spelled, since QGemm wants them, and never shared: with session.x64quantprecision onnxruntime
                # replaces the zero points of each reader, and refuses to replace one twice
                own = f"{stored}_zero_point{'.transposed' * transposed}"
                zeros = self.editor.initializer(own, np.full(len(weight.scale), form.midpoint))
                value = self.editor.node(before, "DequantizeLinear", [value, scale, zeros], stored, axis=axis)
            else:
                across = [-1 if i == axis else 1 for i in range(codes.dim())]
                scale = self.editor.initializer(f"{stored}.scale", weight.scale.reshape(across).numpy())
                value = self.editor.node(before, "Cast", [value], stored, to=ir.DataType.FLOAT)
                value = self.editor.node(before, "Mul", [value, scale], stored)
            self.weights[key] = value
        return self.weights[key]

    def _input_site(self, call: ir.Node) -> str | None:
        """The site whose codes a layer's call reads; None where its input is float, as tokens on a grid are."""
        mark = self._coded_mark(call)
        if mark is None:
            return None
        name = mark.attributes["name"].as_string()
        found = self.simulated.ranges[name]
        return name if found.static and found.integer else None

    def _has_integer_bias(self, name: str, call: ir.Node) -> bool:
        """True where the bias can be written in INT32. A convolution called on inputs of several scales has no one
        grid for it: its bias stays float, and onnxruntime rounds it for each call. Gemm only runs on integers with an
        INT32 bias.
        """
        bias = call.inputs[_BIAS] if len(call.inputs) > _BIAS else None
        if bias is None or bias.const_value is None:
            return False
        return call.op_type == "Gemm" or (call.op_type == "Conv" and len(self.sites[name]) == 1)

    def _bias(self, name: str, call: ir.Node, site: str) -> ir.Value:
        """A layer's bias on the grid of its input's scale times its weight's scales."""
        if (name, site) not in self.biases:
            bias = call.inputs[_BIAS]
            assert bias is not None and bias.const_value is not None
            self.editor.set_aside(bias)
            found = self.simulated.ranges[site]
            assert found.static and found.integer, "layers read codes of no other kind"
            step = found.scale * self.simulated.weights[name].scale.reshape(-1)
            codes = torch.round(torch.from_numpy(bias.const_value.numpy()) / step)
            codes = codes.double().clamp(_INT32.min, _INT32.max).to(torch.int32)
            stored = self.editor.initializer(f"{name}.bias", codes.numpy())
            scale = self.editor.initializer(f"{name}.bias.scale", step.numpy())
            dequantized = self.editor.node(call, "DequantizeLinear", [stored, scale], f"{name}.bias", axis=0)
            self.biases[name, site] = dequantized
        return self.biases[name, site]


# Kind of codes -> how they are written: (writer, site's name, its mark, its quantizer) -> what readers get
_SITE_FORMS: dict[str, Callable[[_Writer, str, ir.Node, Any], ir.Value]] = {
    SiteRange.kind: _Writer.uniform_values,
    LogRange.kind: _Writer.log_values,
    TokenRange.kind: _Writer.row_values,
}
