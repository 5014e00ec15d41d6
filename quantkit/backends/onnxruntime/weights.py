"""From marked weights to stored codes: as integer kernels, token kernels, look-ups and float kernels read them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from quantkit.backends.onnxruntime import block_lookup
from quantkit.backends.onnxruntime.composed_weights import Held, composed, held_in
from quantkit.backends.onnxruntime.editing import Editor
from quantkit.backends.onnxruntime.marks import marks
from quantkit.backends.onnxruntime.token_forms import Factors, Tokens, reads_rows, token_product
from quantkit.backends.onnxruntime.weight_forms import (
    StoredCodes,
    dequantized,
    looked_up,
    minifloats,
    picks_rows,
    stored_codes,
    widened,
    widened_rows,
)
from quantkit.simulation.model import SimulatedModel
from quantkit.targets.instruction_sets import VNNI

_BIAS = 2  # its position among the inputs of Conv and Gemm
_INT32 = torch.iinfo(torch.int32)


@dataclass(frozen=True)
class _Read:
    """A call that reads a marked weight: the node, the position of the weight among its inputs, and whether it gets
    the weight with its inputs first, as of a matrix that is transposed in the graph or held so.
    """

    call: ir.Node
    position: int
    turned: bool


def _reads(mark: ir.Node, held: Held) -> list[_Read]:
    reads = []
    for use in mark.outputs[0].uses():
        if use.node.op_type == "Transpose" and tuple(use.node.attributes["perm"].as_ints()) == (1, 0):
            reads += [_Read(turned.node, turned.idx, not held.turned) for turned in use.node.outputs[0].uses()]
        else:
            reads.append(_Read(use.node, use.idx, held.turned))
    return reads


class WeightWriter:
    """Writes the codes of marked weights; what two calls of a layer share is written once.

    ``site_mark`` gives the mark of the site that a call reads first, where that has codes; ``domains`` are operator
    sets that may be used beside ONNX's own. ``expanded`` collects the weights that float kernels read, with their
    shapes.
    """

    def __init__(
        self,
        editor: Editor,
        simulated: SimulatedModel,
        site_mark: Callable[[ir.Node], ir.Node | None],
        instruction_set: str,
        domains: Collection[str] = (),
    ) -> None:
        self.editor, self.simulated, self.site_mark = editor, simulated, site_mark
        self.in_blocks = block_lookup.DOMAIN in domains
        self.start = ir.node("Constant", [], {"value_int": 0})  # what calls share is made ahead of it; taken out again
        self.expanded: dict[ir.Value, tuple[int, ...]] = {}
        self.coded = {name: weight for name, weight in simulated.weights.items() if weight.integer}
        self.half = {name: weight for name, weight in simulated.weights.items() if not weight.scaled}
        self.minifloats = {
            n: weight for n, weight in simulated.weights.items() if weight.scaled and not weight.integer
        }
        self.codes: dict[str, StoredCodes] = {}
        self.widened: dict[str, ir.Value] = {}
        self.joined: dict[tuple[Held, bool], StoredCodes] = {}
        self.factors: dict[tuple[Held, bool], ir.Value] = {}
        self.biases: dict[tuple[Held, str], ir.Value] = {}

        found = [(held_in(simulated, name), mark) for name, mark in marks(editor.graph, "Weight")]
        self.marked = [(held, mark) for held, mark in found if held is not None]
        self.unsigned: set[str] = set()  # layers whose codes are stored so
        self.in_bytes: set[Held] = set()  # read by something else than look-ups, or inside a loop
        for held, mark in self.marked:
            for read in _reads(mark, held):
                if not _is_row_look_up(held, read) or read.call.graph is not editor.graph:
                    self.in_bytes.add(held)
                if self._on_integers(read) and self._full_bytes(held) and instruction_set != VNNI:
                    self.unsigned.update(held.layers)

    def quantize_all(self) -> None:
        """Replace the marks of quantized weights."""
        self.editor.graph.insert_before(self.editor.graph[0], self.start)
        for held, mark in self.marked:
            self.editor.set_aside(mark.inputs[0])
            for read in _reads(mark, held):
                if read.call.graph is self.editor.graph:  # not inside a loop, which reads what is made around it
                    self._quantize_read(held, read)
            if mark.outputs[0].uses():
                value = composed(self.editor, self.start, self.simulated, held, self._value_of)
                self.expanded[value] = held.shape(self.simulated.floats)
                self.editor.replace(mark, value)
            else:
                self.editor.bypass(mark)
        self.editor.graph.remove(self.start)

    def _quantize_read(self, held: Held, read: _Read) -> None:
        """Let a call compute on codes where there is a kernel for them; others read the weight in float."""
        call = read.call
        if not (self.half | self.minifloats).keys().isdisjoint(held.layers):
            if held.name in self.half and _is_row_look_up(held, read):
                table = self._halves_of(held.name)
                self.editor.replace(call, widened_rows(self.editor, call, f"{held.name}.weight", table))
            return
        tokens, site = self._tokens_of(read), self._input_site(call)
        if tokens is not None:
            factors = Factors(held.name, self._joined(held, turned=True), self._scales(held))
            self.editor.replace(call, token_product(self.editor, call, tokens, factors))
        elif held.plain and site is not None:
            call.replace_input_with(read.position, self._factors(held, read))
            if self._has_integer_bias(call):
                call.replace_input_with(_BIAS, self._bias(held, call, site))
        elif _is_row_look_up(held, read):
            self.editor.replace(call, self._looked_up(held, call))

    def _looked_up(self, held: Held, call: ir.Node) -> ir.Value:
        """The rows that a call picks. A table that is expanded to bytes anyway is looked up in these."""
        stored, weight = f"{held.name}.weight", self.coded[held.name]
        block = block_lookup.block_size(weight)
        if self.in_blocks and block is not None and held not in self.in_bytes:
            return block_lookup.looked_up_in_blocks(self.editor, call, stored, weight, block)
        return looked_up(self.editor, call, stored, weight, self._codes_of(held.name))

    def _on_integers(self, read: _Read) -> bool:
        return self._tokens_of(read) is not None or self._input_site(read.call) is not None

    def _full_bytes(self, held: Held) -> bool:
        return held.plain and any(self.simulated.weights[name].bits == 8 for name in held.layers)

    def _value_of(self, name: str) -> ir.Value:
        """The float32 weight of a layer, output channels first."""
        stored = f"{name}.weight"
        if name in self.coded:
            return dequantized(self.editor, self.start, stored, self.coded[name], self._codes_of(name))
        if name not in self.widened and name in self.minifloats:
            self.widened[name] = minifloats(self.editor, self.start, stored, self.minifloats[name])
        elif name not in self.widened:
            self.widened[name] = widened(self.editor, self.start, stored, self._halves_of(name))
        return self.widened[name]

    def _halves_of(self, name: str) -> ir.Value:
        return self.editor.initializer(f"{name}.weight", self.half[name].values.numpy())

    def _codes_of(self, name: str) -> StoredCodes:
        """The codes of a layer, output channels first."""
        if name not in self.codes:
            weight, unsigned = self.coded[name], name in self.unsigned
            stored = f"{name}.weight"
            self.codes[name] = stored_codes(
                self.editor, self.start, stored, weight.codes, weight.format.bits, unsigned
            )
        return self.codes[name]

    def _joined(self, held: Held, turned: bool) -> StoredCodes:
        """The codes of layers that follow each other, as rows or, ``turned``, as columns."""
        if (held, turned) not in self.joined:
            parts = [self._codes_of(name) for name in held.layers]
            value, name = parts[0].value, f"{held.name}.weight"
            if len(parts) > 1:
                value = self.editor.node(self.start, "Concat", [part.value for part in parts], name, axis=0)
            if turned:  # of codes, as onnxruntime carries that out when it loads the file
                value = self.editor.node(self.start, "Transpose", [value], name, perm=[1, 0])
            self.joined[held, turned] = StoredCodes(value, parts[0].unsigned)
        return self.joined[held, turned]

    def _scales(self, held: Held) -> Tensor:
        return torch.cat([self.coded[name].scale.reshape(-1) for name in held.layers])

    def _factors(self, held: Held, read: _Read) -> ir.Value:
        """The weight as integer kernels read it: dequantized codes, zero points spelled since QGemm wants them."""
        if (held, read.turned) not in self.factors:
            codes, stored = self._joined(held, read.turned), f"{held.name}.weight"
            scales = self._scales(held)
            scale = self.editor.initializer(f"{stored}.scale", scales.numpy())
            # never shared: with session.x64quantprecision onnxruntime replaces the zero points of each reader, and
            # refuses to replace one twice
            own = f"{stored}_zero_point{'.turned' * read.turned}"
            zero = self.editor.initializer(own, np.full(len(scales), codes.midpoint))
            self.factors[held, read.turned] = self.editor.node(
                self.start, "DequantizeLinear", [codes.value, scale, zero], stored, axis=1 if read.turned else 0
            )
        return self.factors[held, read.turned]

    def _tokens_of(self, read: _Read) -> Tokens | None:
        """The site of tokens that a call multiplies by the weight, where that is all it does."""
        mark = self.site_mark(read.call) if read.position == 1 else None
        if mark is None:
            return None
        name, value = mark.attributes["name"].as_string(), mark.inputs[0]
        found = self.simulated.ranges[name]
        if found.static or not found.integer or value is None or not reads_rows(read.call, read.turned):
            return None
        return Tokens(name, value, found)

    def _input_site(self, call: ir.Node) -> str | None:
        """The site whose codes a call reads; None where its input is float, as tokens on a grid are."""
        mark = self.site_mark(call)
        if mark is None:
            return None
        name = mark.attributes["name"].as_string()
        found = self.simulated.ranges[name]
        return name if found.static and found.integer else None

    def _has_integer_bias(self, call: ir.Node) -> bool:
        """True where the bias is written in INT32: as the simulated model has it, once for all calls or for each."""
        bias = call.inputs[_BIAS] if len(call.inputs) > _BIAS else None
        if bias is None or bias.const_value is None:
            return False
        return call.op_type in ("Conv", "Gemm")

    def _bias(self, held: Held, call: ir.Node, site: str) -> ir.Value:
        """A layer's bias on the grid of its input's scale times its weight's scales."""
        if (held, site) not in self.biases:
            bias = call.inputs[_BIAS]
            assert bias is not None and bias.const_value is not None
            self.editor.set_aside(bias)
            found, name = self.simulated.ranges[site], f"{held.name}.bias"
            assert found.static and found.integer, "layers read codes of no other kind"
            step = found.scale * self._scales(held)
            codes = torch.round(torch.from_numpy(bias.const_value.numpy()) / step)
            codes = codes.double().clamp(_INT32.min, _INT32.max).to(torch.int32)
            stored = self.editor.initializer(name, codes.numpy())
            scale = self.editor.initializer(f"{name}.scale", step.numpy())
            self.biases[held, site] = self.editor.node(call, "DequantizeLinear", [stored, scale], name, axis=0)
        return self.biases[held, site]


def _is_row_look_up(held: Held, read: _Read) -> bool:
    """Whether a call picks rows of one layer's weight."""
    alone = held.plain and len(held.layers) == 1 and not read.turned
    return alone and read.position == 0 and picks_rows(read.call)
