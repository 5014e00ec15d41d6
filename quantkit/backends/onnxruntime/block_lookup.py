"""Tables of 4 bits that are only looked up, by an operator of onnxruntime's own that reads them as they are stored.

With standard operators codes are expanded to bytes when a file is loaded, as ONNX's Gather takes no INT4; this one
keeps a table at half of that in memory, for a little more time (docs/results/own-operators.md). It reads pairs of
codes from bytes: from INT4, which it takes too, it is five times slower.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from quantkit.backends.onnxruntime.editing import Editor
from quantkit.backends.onnxruntime.weight_forms import expanded_scale
from quantkit.numbers.packing import pack_plane
from quantkit.numbers.uniform import QuantizedWeight

DOMAIN = "com.microsoft"
_BITS = 4
_SMALLEST_BLOCK = 16


def block_size(weight: QuantizedWeight) -> int | None:
    """The inputs that share a scale in the operator's terms, a power of two from 16, of a table (rows, inputs) of 4
    bits; None where it does not take the table. A row of one scale may be shorter than its block; of codes and of zero
    points it has pairs.
    """
    if weight.format.bits != _BITS or weight.codes.dim() != 2:
        return None
    inputs, groups = weight.codes.shape[1], weight.scale.shape[1]
    if inputs % 2 or (weight.zero_point is not None and groups % 2):
        return None
    if groups == 1:
        return max(_SMALLEST_BLOCK, 1 << (inputs - 1).bit_length())
    size = inputs // groups
    return size if size >= _SMALLEST_BLOCK and size.bit_count() == 1 else None


def looked_up_in_blocks(editor: Editor, call: ir.Node, name: str, weight: QuantizedWeight, block: int) -> ir.Value:
    """The float32 values of the rows that a Gather picks of a table, bit for bit those of its dequantized codes."""
    editor.graph.opset_imports.setdefault(DOMAIN, 1)
    inputs = [
        editor.initializer(name, _pairs(weight.codes)),
        call.inputs[1],
        expanded_scale(editor, call, name, weight, tuple(weight.scale.shape)),
    ]
    if weight.zero_point is not None:
        inputs.append(editor.initializer(f"{name}.zero_point", _pairs(weight.zero_point.reshape(weight.scale.shape))))
    return editor.node(
        call, "GatherBlockQuantized", inputs, name, domain=DOMAIN, quantize_axis=1, block_size=block, bits=_BITS
    )


def _pairs(codes: Tensor) -> np.ndarray:
    """Two codes of a row to a byte, the first in the low bits, around 8, which stands for zero."""
    middle = 1 << _BITS - 1
    return pack_plane((codes + middle).reshape(-1).view(torch.uint8), _BITS).reshape(len(codes), -1).numpy()
