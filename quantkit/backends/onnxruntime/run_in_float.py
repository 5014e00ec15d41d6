"""Which layers onnxruntime runs in float although their file has codes for what they read: where it knows no integer
kernel for a pattern, it multiplies what codes stand for.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from quantkit.program.sites import coded_sites
from quantkit.simulation.model import SimulatedModel

_FLOAT_PRODUCTS = frozenset("Conv FusedConv Gemm FusedGemm MatMul FusedMatMul ConvTranspose".split())
_DOMAINS = frozenset({"", "com.microsoft", "com.microsoft.nchwc"})


def layers_in_float(optimized: str | Path, simulated: SimulatedModel) -> tuple[str, ...]:
    """The layers of ``simulated`` that read integer codes and run in float in a graph that onnxruntime has optimized,
    in the order of the graph.
    """
    coded = coded_sites(simulated.sites, simulated.ranges)
    integer = [s for s in coded if simulated.ranges[s.name].static and simulated.ranges[s.name].integer]
    layers = {layer for site in integer for layer in site.consumers if layer in simulated.weights}
    found = dict[str, None]()
    for node in onnx.load(str(optimized), load_external_data=False).graph.node:
        if node.op_type in _FLOAT_PRODUCTS and node.domain in _DOMAINS:
            found |= dict.fromkeys(name for name in map(_layer_of, node.input) if name in layers)
    return tuple(found)


def _layer_of(value: str) -> str:
    """The layer whose weight a value of the graph is, by its name: ``<layer>.weight`` or what was made of that."""
    return value.rpartition(".weight")[0]
