"""How a layer's codes lie in the file: true size for every width, expanded to INT8 once, when onnxruntime loads it.
Weights of float16 and FP8, and scales of fewer bits than float32, are stored as such and expanded to float32. Numbers
of four bits are INT4 in the file, and powers of two bytes, as onnxruntime has no operators for their types: they are
looked up in a table of all.

=======  ==================================================  ==========================================
bits     initializers                                        expanded by
=======  ==================================================  ==========================================
8        INT8; for some CPUs UINT8 around 128, see below     nothing
4        INT4                                                Cast
2,3,5-7  one plane for each power of two in the width, as    ``quantkit::Unpack<bits>``, a function of
         bytes: those of ``kernels.packing``                 standard operators that the file carries
=======  ==================================================  ==========================================

onnxruntime folds all of them to the same INT8 tensor, so speed does not depend on the width. Planes are bytes and not
ONNX's INT2 and UINT4 because these need opset 25 and a newer runtime for the same size and the same speed; the
function keeps the graph readable and the file small where a dozen nodes for each layer would not. Tables of 4 bits
that are only looked up have another form, see ``block_lookup``.

On x86 CPUs without VNNI onnxruntime multiplies unsigned by signed bytes in pairs that it adds in 16 bits, which
saturates: 2 x 255 x 127 does not fit, what 7-bit codes give does. For two unsigned operands it widens first, which is
exact. So a file written for such CPUs has full 8-bit weights unsigned for integer kernels. With VNNI signed bytes are
exact, and much faster than unsigned ones. A file written for it computes the same on a CPU without VNNI if
its session is opened with ``session.x64quantprecision`` set to 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from ml_dtypes import bfloat16, float8_e4m3fn, float8_e5m2
from onnx import parser
from torch import Tensor

from quantkit.backends.onnxruntime.editing import Editor
from quantkit.backends.onnxruntime.marks import DOMAIN, OPSET
from quantkit.formats import bit_planes
from quantkit.numbers.minifloat_weight import MinifloatWeight
from quantkit.numbers.packed_weight import packed_scale
from quantkit.numbers.packing import pack_plane, split_planes
from quantkit.numbers.scales import of_exponents
from quantkit.numbers.uniform import QuantizedWeight

AnyScaled = QuantizedWeight | MinifloatWeight
IR_VERSION = 10
# Tried on the releases themselves: 1.19 unpacks planes, Cast from INT4 and look-ups of pairs came with 1.23.
_MINIMUM_RUNTIME = "1.19"
_MINIMUM_RUNTIME_INT4 = "1.23"
_OTHER_TYPES = {torch.float8_e4m3fn: float8_e4m3fn, torch.bfloat16: bfloat16}
_SIXTEEN = torch.arange(16, dtype=torch.uint8, device="cpu")
_FP8 = {"fp8": float8_e4m3fn, "fp8e5m2": float8_e5m2}
# onnxruntime folds results of up to 1 GiB, and unpacking passes through INT32.
LARGEST_UNPACKED = 1 << 28


def minimum_runtime(widths: Iterable[int]) -> str:
    """The oldest onnxruntime that runs a file with weights of these widths."""
    return _MINIMUM_RUNTIME_INT4 if 4 in widths else _MINIMUM_RUNTIME


@dataclass(frozen=True)
class StoredCodes:
    """Codes in a graph, expanded to bytes: INT8, or ``unsigned`` ones around 128."""

    value: ir.Value
    unsigned: bool = False

    @property
    def midpoint(self) -> np.generic:
        """What stands for zero."""
        return np.uint8(128) if self.unsigned else np.int8(0)


def stored_codes(
    editor: Editor, before: ir.Node, name: str, codes: Tensor, bits: int, unsigned: bool = False
) -> StoredCodes:
    """``codes`` (INT8, any shape) of ``bits`` bits: stored in initializers named after ``name``, expanded ahead of
    ``before``.
    """
    shape = tuple(codes.shape)
    if bits == 8:
        held = (codes ^ -128).view(torch.uint8) if unsigned else codes
        return StoredCodes(editor.initializer(name, held.numpy()), unsigned)
    if bits == 4:
        value = editor.node(before, "Cast", [_fours(editor, name, codes)], name, to=ir.DataType.INT8)
    else:
        planes = [
            editor.initializer(f"{name}.plane{width}", pack_plane(values, width).reshape(-1, 1).numpy())
            for width, values in split_planes(codes, bits)
        ]
        call = {"shape": shape, "count": [math.prod(shape)]}
        value = editor.node(before, f"Unpack{bits}", planes, name, domain=DOMAIN, **call)
    if unsigned:
        middle = editor.initializer("midpoint.int32", np.array(128, np.int32))
        value = editor.node(before, "Cast", [value], name, to=ir.DataType.INT32)
        value = editor.node(before, "Add", [value, middle], name)
        value = editor.node(before, "Cast", [value], name, to=ir.DataType.UINT8)
    return StoredCodes(value, unsigned)


def _fours(editor: Editor, name: str, codes: Tensor) -> ir.Value:
    packed = pack_plane(codes.reshape(-1).view(torch.uint8) & 0xF, 4)
    return editor.initializer(name, ir.PackedTensor(packed.numpy(), ir.DataType.INT4, shape=tuple(codes.shape)))


def _looked_up_in(editor: Editor, before: ir.Node, name: str, codes: ir.Value, table: ir.Value) -> ir.Value:
    places = editor.node(before, "Cast", [codes], name, to=ir.DataType.INT32)
    return editor.node(before, "Gather", [table, places], name, axis=0)


def widened(editor: Editor, before: ir.Node, name: str, halves: ir.Value) -> ir.Value:
    """The float32 value of what is stored as float16, by an operator that onnxruntime carries out when it loads the
    file.
    """
    return editor.node(before, "Cast", [halves], name, to=ir.DataType.FLOAT)


def expanded_scale(editor: Editor, before: ir.Node, name: str, weight: AnyScaled, shape: tuple[int, ...]) -> ir.Value:
    """The scales of a weight in float32 and in this shape, from what its format stores."""
    packed, shared = packed_scale(weight)
    packed, name = packed.reshape(shape), f"{name}.scale"
    if packed.dtype == torch.float32:
        return editor.initializer(name, packed.numpy())
    if packed.dtype == torch.uint8:
        powers = of_exponents(torch.arange(1, 255, dtype=torch.uint8, device="cpu"))
        table = editor.initializer("powers_of_two", np.concatenate([powers[:1], powers, powers[-1:]]))
        return _looked_up_in(editor, before, name, editor.initializer(name, packed.numpy()), table)
    value = widened(editor, before, name, editor.initializer(name, _array(packed)))
    if shared is None:
        return value
    factor = shared.reshape(-1, *[1] * (len(shape) - 1)) if shared.dim() else shared
    held = editor.initializer(f"{name}.shared", _array(factor))
    wide = held if factor.dtype == torch.float32 else widened(editor, before, f"{name}.shared", held)
    return editor.node(before, "Mul", [value, wide], name)


def _array(tensor: Tensor) -> np.ndarray:
    """A tensor of a type that numpy may not have."""
    other = _OTHER_TYPES.get(tensor.dtype)
    return tensor.numpy() if other is None else tensor.contiguous().view(torch.uint8).numpy().view(other)


def picks_rows(call: ir.Node) -> bool:
    """Whether a call looks up rows of its first input."""
    return call.op_type == "Gather" and ("axis" not in call.attributes or call.attributes["axis"].as_int() == 0)


def widened_rows(editor: Editor, call: ir.Node, name: str, table: ir.Value) -> ir.Value:
    """The float32 values of the rows of a float16 table that a Gather picks: they are widened, never the table."""
    return widened(editor, call, name, editor.node(call, "Gather", [table, call.inputs[1]], name, axis=0))


def dequantized(editor: Editor, before: ir.Node, name: str, weight: QuantizedWeight, codes: StoredCodes) -> ir.Value:
    """The float32 value of a weight, output channels first, from its codes. Made by operators that onnxruntime carries
    out when it loads the file.
    """
    grid = _Grid(editor, before, name, weight)
    value = _centred(editor, before, name, grid.grouped(codes))
    if (zero := grid.zero_point()) is not None:
        value = editor.node(before, "Sub", [value, _centred(editor, before, f"{name}.zero_point", zero)], name)
    return grid.in_shape(editor.node(before, "Mul", [value, grid.scale()], name))


def minifloats(editor: Editor, before: ir.Node, name: str, weight: MinifloatWeight) -> ir.Value:
    """The float32 value of a weight of floating-point numbers, output channels first, made when the file is loaded."""
    if weight.bits == 4:
        table = editor.initializer("numbers_of_4_bits", weight.numbers.decode(_SIXTEEN).numpy())
        value = _looked_up_in(editor, before, name, _fours(editor, name, weight.codes), table)
    else:
        stored = weight.codes.numpy().view(_FP8[weight.format.fmt])
        value = widened(editor, before, name, editor.initializer(name, stored))
    grid = _Grid(editor, before, name, weight)
    value = editor.node(before, "Mul", [grid.grouped(StoredCodes(value)).value, grid.scale()], name)
    return grid.in_shape(value)


def looked_up(editor: Editor, call: ir.Node, name: str, weight: QuantizedWeight, codes: StoredCodes) -> ir.Value:
    """The float32 values of the rows of a table that a Gather picks: its codes are looked up, so that the table is
    never expanded to float.
    """
    grid, rows = _Grid(editor, call, name, weight), call.inputs[1]

    def gathered(table: ir.Value, role: str) -> ir.Value:
        return editor.node(call, "Gather", [table, rows], f"{name}{role}", axis=0)

    picked = StoredCodes(gathered(grid.grouped(codes).value, ""), codes.unsigned)
    value = _centred(editor, call, name, picked)
    if (zero := grid.zero_point()) is not None:
        own = StoredCodes(gathered(zero.value, ".zero_point"))
        value = editor.node(call, "Sub", [value, _centred(editor, call, f"{name}.zero_point", own)], name)
    value = editor.node(call, "Mul", [value, gathered(grid.scale(), ".scale")], name)
    if not grid.in_groups:
        return value

    sizes = editor.node(call, "Shape", [rows], name)
    last = editor.initializer(f"{name}.width", np.array([math.prod(weight.codes.shape[1:])], np.int64))
    return editor.node(call, "Reshape", [value, editor.node(call, "Concat", [sizes, last], name, axis=0)], name)


@dataclass(frozen=True)
class _Grid:
    """Scales and zero points of a weight in a graph, to be broadcast over codes: with output channels first, and with
    an axis for the groups and one for the inputs of each where there are some.
    """

    editor: Editor
    before: ir.Node
    name: str
    weight: AnyScaled

    @property
    def in_groups(self) -> bool:
        return self.weight.scale.shape[1] > 1 or self.weight.zero_point is not None

    @property
    def across(self) -> tuple[int, ...]:
        channels, groups = self.weight.scale.shape
        return (channels, groups, 1) if self.in_groups else (channels, *[1] * (self.weight.codes.dim() - 1))

    def grouped(self, codes: StoredCodes) -> StoredCodes:
        if not self.in_groups:
            return codes
        shape = self.editor.initializer(f"{self.name}.groups", np.array((*self.weight.scale.shape, -1), np.int64))
        return StoredCodes(self.editor.node(self.before, "Reshape", [codes.value, shape], self.name), codes.unsigned)

    def in_shape(self, value: ir.Value) -> ir.Value:
        """Values of groups in the shape of the weight."""
        if not self.in_groups:
            return value
        whole = self.editor.initializer(f"{self.name}.shape", np.array(self.weight.codes.shape, np.int64))
        return self.editor.node(self.before, "Reshape", [value, whole], self.name)

    def scale(self) -> ir.Value:
        return expanded_scale(self.editor, self.before, self.name, self.weight, self.across)

    def zero_point(self) -> StoredCodes | None:
        zero = self.weight.zero_point
        if zero is None:
            return None
        own = f"{self.name}.zero_point"
        return stored_codes(self.editor, self.before, own, zero.reshape(self.across), self.weight.format.bits)


def _centred(editor: Editor, before: ir.Node, name: str, codes: StoredCodes) -> ir.Value:
    """Codes in float32, around zero."""
    value = editor.node(before, "Cast", [codes.value], name, to=ir.DataType.FLOAT)
    if not codes.unsigned:
        return value
    middle = editor.initializer("midpoint.float", np.array(codes.midpoint, np.float32))
    return editor.node(before, "Sub", [value, middle], name)


def add_functions(model: ir.Model) -> None:
    """Give a model the functions that its nodes call."""
    names = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for bits in range(2, 9):
        if f"Unpack{bits}" in names:
            function = ir.serde.deserialize_function(parser.parse_function(unpack_function(bits)))
            model.functions[function.identifier()] = function


def unpack_function(bits: int) -> str:
    """The text of the ONNX function that turns byte planes (n, 1) of codes of ``bits`` bits into INT8 codes of a
    shape.

    Every byte is shifted by each position and masked; what pads a plane to whole bytes is cut off; planes are joined
    high bits first and the offset that made the codes unsigned is taken away.
    """
    widths = bit_planes(bits)
    lines = []
    for width in widths:
        shifts = ", ".join(str(s) for s in range(0, 8, width))
        lines += [
            f"shifts{width} = Constant <value = uint8[{8 // width}] {{{shifts}}}> ()",
            f"mask{width} = Constant <value = uint8 {{{(1 << width) - 1}}}> ()",
            f'shifted{width} = BitShift <direction = "RIGHT"> (plane{width}, shifts{width})',
            f"masked{width} = BitwiseAnd (shifted{width}, mask{width})",
            f"flat{width} = Reshape (masked{width}, minus_one)",
            f"field{width} = Slice (flat{width}, zero, count)",
        ]
    joined = f"field{widths[0]}"
    for width in widths[1:]:
        lines += [
            f"by{width} = Constant <value = uint8 {{{width}}}> ()",
            f'high{width} = BitShift <direction = "LEFT"> ({joined}, by{width})',
            f"joined{width} = BitwiseOr (high{width}, field{width})",
        ]
        joined = f"joined{width}"
    body = "\n".join(lines)
    return f"""
        <opset_import: ["" : {OPSET}], domain: "{DOMAIN}">
        Unpack{bits} <shape, count> ({", ".join(f"plane{width}" for width in widths)}) => (codes) {{
            shape = Constant <value_ints: ints = @shape> ()
            count = Constant <value_ints: ints = @count> ()
            zero = Constant <value_ints = [0]> ()
            minus_one = Constant <value_ints = [-1]> ()
            {body}
            wide = Cast <to = {ir.DataType.INT32.value}> ({joined})
            offset = Constant <value = int32 {{{1 << bits - 1}}}> ()
            signed = Sub (wide, offset)
            narrow = Cast <to = {ir.DataType.INT8.value}> (signed)
            codes = Reshape (narrow, shape)
        }}"""
