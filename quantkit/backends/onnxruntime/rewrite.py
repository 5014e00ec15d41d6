"""From marks to integers: QuantizeLinear and DequantizeLinear at sites, stored codes for weights, INT32 biases."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from quantkit.backends.onnxruntime.editing import Editor
from quantkit.backends.onnxruntime.marks import DOMAIN, marks
from quantkit.backends.onnxruntime.moved_codes import move_codes
from quantkit.backends.onnxruntime.token_forms import Tokens, divided_values, token_values
from quantkit.backends.onnxruntime.weight_forms import LARGEST_UNPACKED, add_functions
from quantkit.backends.onnxruntime.weights import WeightWriter
from quantkit.errors import InvalidRequest
from quantkit.numbers.kinds import AnyWeight
from quantkit.numbers.logarithmic import LogRange
from quantkit.numbers.per_token import TokenRange
from quantkit.numbers.uniform import SiteRange
from quantkit.program.sites import coded_sites
from quantkit.simulation.model import SimulatedModel

BYTE = 8  # bits of a code as kernels read it


def bypass_marks(graph: ir.Graph) -> None:
    """Take all marks out: the float graph."""
    editor = Editor(graph)
    for kind in ("Site", "Weight"):
        for _, mark in marks(graph, kind):
            editor.bypass(mark)


def quantize_marks(
    model: ir.Model, simulated: SimulatedModel, instruction_set: str, domains: Collection[str] = ()
) -> None:
    """Turn the marks of ``simulated``'s layers and sites into integers and take the others out. ``instruction_set``:
    of the CPUs that the file is for; ``domains``: operator sets that it may use beside ONNX's own.

    Raises InvalidRequest for codes of sites that have no ONNX form.
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
    editor = Editor(graph)
    sites = _SiteWriter(editor, simulated)
    weights = WeightWriter(editor, simulated, sites.coded_mark, instruction_set, domains)
    weights.quantize_all()
    sites.expanded = weights.expanded
    for _, mark in marks(graph, "Weight"):
        editor.bypass(mark)
    for name, mark in marks(graph, "Site"):
        if sites.is_coded(mark):
            sites.quantize(name, mark)
        else:
            editor.bypass(mark)
    move_codes(graph)
    add_functions(model)


def _require_form(name: str, weight: AnyWeight) -> None:
    unpacked = weight.bits not in ((4, 8) if weight.integer else (8, 16))
    if unpacked and math.prod(weight.shape) > LARGEST_UNPACKED:
        raise InvalidRequest(
            f"Layer {name!r} has {math.prod(weight.shape):,} weights in {weight.format}; onnxruntime expands at most "
            f"{LARGEST_UNPACKED:,} when it loads a file and would expand more on every run. Give it 4 or 8 bits."
        )


def _channels_of_float_layer(node: ir.Node, expanded: Mapping[ir.Value, tuple[int, ...]]) -> int | None:
    """The input channels (axis 1) of a layer that reads its weight in float, from an initializer or ``expanded``; None
    for other nodes, and for a single channel, which has but one scale.
    """
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or (weight := node.inputs[1]) is None:
        return None
    made, turned = weight.producer(), False
    if made is not None and made.op_type == "Transpose" and (weight := made.inputs[0]) is not None:
        turned = True
    shape = None if weight is None else expanded.get(weight)
    if shape is None:
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


class _SiteWriter:
    """Replaces the marks of sites one by one; what the echoes of a site share is written once. ``expanded`` are the
    weights that float kernels read, with their shapes.
    """

    def __init__(self, editor: Editor, simulated: SimulatedModel) -> None:
        self.editor, self.simulated = editor, simulated
        self.expanded: Mapping[ir.Value, tuple[int, ...]] = {}
        self.codes: dict[tuple[str, ir.Value | None], ir.Value] = {}  # of a tensor that several calls read: made once
        coded = coded_sites(simulated.sites, simulated.ranges)
        self.places = {str(place) for site in coded for place in (*site.places, *site.echoes)}

    def is_coded(self, mark: ir.Node) -> bool:
        """Whether the simulated model has codes at this place."""
        return mark.attributes["place"].as_string() in self.places

    def coded_mark(self, call: ir.Node) -> ir.Node | None:
        """The mark of the site that a call reads first, where that has codes."""
        made = call.inputs[0].producer() if call.inputs[0] is not None else None
        is_site = made is not None and made.domain == DOMAIN and made.op_type == "Site"
        return made if made is not None and is_site and self.is_coded(made) else None

    def quantize(self, name: str, mark: ir.Node) -> None:
        site = self.simulated.ranges[name]
        self.editor.replace(mark, _SITE_FORMS[site.kind](self, name, mark, site))

    def uniform_values(self, name: str, mark: ir.Node, site: SiteRange) -> ir.Value:
        """Codes and what they stand for, as a pair that onnxruntime fuses with its neighbours."""
        scale = self.editor.initializer(f"{name}.scale", np.array(site.scale, np.float32))
        zero = self.editor.initializer(f"{name}.zero_point", np.array(site.zero_point, np.uint8))
        codes = self.codes.get((name, mark.inputs[0]))
        if codes is None:
            source = mark.inputs[0]
            assert source is not None
            # the layers that read the codes have weights for inputs that are divided
            source = divided_values(self.editor, mark, name, source, site.ratio)
            codes = self.editor.node(mark, "QuantizeLinear", [source, scale, zero], name)
            if (
                site.bits < BYTE
            ):  # bytes saturate at 255; clipping codes, not values, leaves the kernel before it integer
                highest = self.editor.initializer(f"{name}.highest", np.array(site.high, np.uint8))
                codes = self.editor.node(mark, "Clip", [codes, None, highest], name)
            self.codes[name, mark.inputs[0]] = codes
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
            channels = _channels_of_float_layer(use.node, self.expanded) if use.idx == 0 else None
            if channels is None:
                continue
            if channels not in made:
                scales = self.editor.initializer(f"{name}.scales", np.full(channels, site.scale, np.float32))
                zeros = self.editor.initializer(f"{name}.zero_points", np.full(channels, site.zero_point, np.uint8))
                made[channels] = self.editor.node(mark, "DequantizeLinear", [codes, scales, zeros], name, axis=1)
            use.node.replace_input_with(0, made[channels])


# Kind of codes -> how they are written: (writer, site's name, its mark, its quantizer) -> what readers get
_SITE_FORMS: dict[str, Callable[[_SiteWriter, str, ir.Node, Any], ir.Value]] = {
    SiteRange.kind: _SiteWriter.uniform_values,
    LogRange.kind: _SiteWriter.log_values,
    TokenRange.kind: _SiteWriter.row_values,
}
