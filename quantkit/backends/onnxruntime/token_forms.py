"""Tokens in an ONNX graph: a scale for each row, found as the model runs, and products of their codes on integers.

Operators that every runtime has; onnxruntime's own dynamic quantization has one scale for a whole tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from torch import Tensor

from quantkit.backends.onnxruntime.editing import Editor
from quantkit.backends.onnxruntime.weight_forms import StoredCodes
from quantkit.numbers.per_token import SMALLEST_STEP, TokenRange
from quantkit.numbers.ratios import Ratio, factors

CENTRE = 128  # on x86 integer kernels read unsigned bytes
_BIAS = 2


@dataclass(frozen=True)
class Tokens:
    """A site whose rows are quantized as they come: its name, its float values, and how."""

    name: str
    values: ir.Value
    range: TokenRange


def divided_values(editor: Editor, before: ir.Node, name: str, values: ir.Value, ratio: Ratio) -> ir.Value:
    """Values as codes are made of them: divided by the ratio of each channel, if there is one."""
    if not ratio:
        return values
    inverse = editor.initializer(f"{name}.ratio", factors(ratio).reciprocal().numpy())
    return editor.node(before, "Mul", [values, inverse], name)


def _codes_and_scale(editor: Editor, before: ir.Node, tokens: Tokens) -> list[ir.Value]:
    """The codes of tokens, still as floats, and the scale of each row."""
    name = tokens.name
    x = divided_values(editor, before, name, tokens.values, tokens.range.ratio)
    last = editor.initializer("last", np.array([-1], np.int64))
    top = editor.initializer(f"{name}.highest", np.array(tokens.range.high, np.float32))
    least = editor.initializer("smallest_step", np.array(SMALLEST_STEP, np.float32))
    largest = editor.node(before, "Abs", [x], name)
    largest = editor.node(before, "ReduceMax", [largest, last], name, keepdims=1)
    scale = editor.node(before, "Div", [largest, top], name)
    scale = editor.node(before, "Max", [scale, least], name)
    codes = editor.node(before, "Div", [x, scale], name)
    return [editor.node(before, "Round", [codes], name), scale]


def token_values(editor: Editor, before: ir.Node, tokens: Tokens) -> ir.Value:
    """Tokens on the grids of their rows, in float."""
    return editor.node(before, "Mul", _codes_and_scale(editor, before, tokens), tokens.name)


def reads_rows(call: ir.Node, transposed: bool) -> bool:
    """Whether a call multiplies rows by a weight (outputs, inputs), which it reads ``transposed`` or as it is, and
    does nothing else but add a bias.
    """
    if call.op_type == "MatMul":
        return transposed
    given = {name: attribute.value for name, attribute in call.attributes.items()}
    plain = given.get("alpha", 1.0) == given.get("beta", 1.0) == 1.0 and not given.get("transA")
    return call.op_type == "Gemm" and plain and bool(given.get("transB")) != transposed


@dataclass(frozen=True)
class Factors:
    """What rows are multiplied by: a weight's codes (inputs, outputs), and its scales."""

    layer: str
    codes: StoredCodes
    scale: Tensor


def token_product(editor: Editor, call: ir.Node, tokens: Tokens, factors: Factors) -> ir.Value:
    """What a call that ``reads_rows`` makes of tokens, in the order of the package's own kernels: an integer sum,
    times the scale of the weight, times that of the row, plus the bias.
    """
    name, layer = tokens.name, factors.layer
    codes, scale = _codes_and_scale(editor, call, tokens)
    centre = editor.initializer("token_centre", np.array(CENTRE, np.float32))
    codes = editor.node(call, "Add", [codes, centre], name)
    codes = editor.node(call, "Cast", [codes], name, to=ir.DataType.UINT8)
    zeros = [editor.initializer("token_zero", np.array(CENTRE, np.uint8))]
    zeros += [editor.initializer("midpoint", np.array(factors.codes.midpoint))] if factors.codes.unsigned else []
    steps = editor.initializer(f"{layer}.weight.scale", factors.scale.reshape(-1).numpy())
    made = editor.node(call, "MatMulInteger", [codes, factors.codes.value, *zeros], layer)
    made = editor.node(call, "Cast", [made], layer, to=ir.DataType.FLOAT)
    made = editor.node(call, "Mul", [made, steps], layer)
    made = editor.node(call, "Mul", [made, scale], layer)
    bias = call.inputs[_BIAS] if len(call.inputs) > _BIAS else None
    return made if bias is None else editor.node(call, "Add", [made, bias], layer)
