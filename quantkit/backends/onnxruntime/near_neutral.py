"""Constants that are nearly zero or one, kept through torch's optimization of what it has exported.

The exporter takes out additions of zero and multiplications by one, and takes for those every constant within 1e-8 of
zero and, relatively, 1e-5 of one. So ``x * rsqrt(mean(x ** 2) + 1e-8)`` loses what keeps it finite where a row is
zero, as embedded padding is. Such constants are hidden behind an operation that it does not know.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from quantkit.program.intercept import CALL_ERRORS
from quantkit.progress import log

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

_KEPT = "Kept"
_NEUTRAL = (0.0, 1.0)
_RELATIVE, _ABSOLUTE = 1.01e-5, 1.01e-8  # a little more than what the exporter goes by


def optimized(exported: ONNXProgram, domain: str) -> ir.Model:
    """The graph of an exported program after ``optimize``, without changes to what it computes. ``domain`` is one
    whose operations the exporter does not know.
    """
    kept = _hide(exported.model, domain)
    try:
        exported.optimize()
    except CALL_ERRORS as error:  # a fault of the optimizer's: the graph it leaves is compared as any other is
        log.debug("the exported graph was optimized in part: %s: %s", type(error).__name__, error)
    for node in kept:
        constant = node.inputs[0]
        if node.graph is not None and constant is not None:  # otherwise it is gone with what read it
            ir.convenience.replace_all_uses_with(node.outputs[0], constant, replace_graph_outputs=True)
            node.graph.remove(node, safe=True)
    return exported.model


def _hide(model: ir.Model, domain: str) -> list[ir.Node]:
    graph, kept = model.graph, []
    constants = [node.outputs[0] for node in graph if node.op_type == "Constant" and node.domain == ""]
    for value in (*graph.initializers.values(), *constants):
        if not _is_near_neutral(value):
            continue
        uses, producer = tuple(value.uses()), value.producer()
        node = ir.node(_KEPT, [value], domain=domain)
        node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
        if producer is None:
            graph.insert_before(graph[0], node)
        else:
            graph.insert_after(producer, node)
        for use in uses:
            use.node.replace_input_with(use.idx, node.outputs[0])
        kept.append(node)
    if kept:
        graph.opset_imports.setdefault(domain, 1)
    return kept


def _is_near_neutral(value: ir.Value) -> bool:
    found = ir.convenience.get_const_tensor(value)
    if found is None or found.size != 1 or not found.dtype.is_floating_point():
        return False
    number = float(np.asarray(found.numpy(), np.float64).reshape(()))
    return number not in _NEUTRAL and any(
        math.isclose(number, neutral, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE) for neutral in _NEUTRAL
    )
