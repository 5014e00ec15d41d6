"""Simulated models and readings of ONNX files for the export tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
import torch
from torch import nn

from quantkit.backends.onnxruntime.sessions import open_session
from quantkit.formats import WeightFormat
from quantkit.numbers.packing import pack
from quantkit.program.inputs import Batch
from quantkit.program.integer_biases import bias_calls
from quantkit.ranges.activations import minmax_range
from quantkit.ranges.statistics import site_histograms
from quantkit.rounding.in_sequence import round_biases
from quantkit.rounding.weights import quantize_weight
from quantkit.simulation.model import SimulatedModel
from quantkit.targets import Target
from quantkit.transforms.prepare import Prepared, leave_float, prepare


def prepared(model: nn.Module, batch: Batch, keep_float: Sequence[str] = ()) -> Prepared:
    target = Target.load("onnxruntime-cpu")
    ready = prepare(model, [batch], target)
    return leave_float(ready, target, keep_float) if keep_float else ready


def simulate(ready: Prepared, batch: Batch, bits: int | Callable[[int], int], site_bits: int = 8) -> SimulatedModel:
    """All quantizable layers rounded to nearest at ``bits`` (or bits of the layer's position), sites by min-max."""
    histograms = site_histograms(ready.model, ready.sites, [batch], False)
    ranges = {name: minmax_range(histogram, site_bits) for name, histogram in histograms.items()}
    simulated = SimulatedModel(ready.model, ready.sites, {}, ranges)
    for position, name in enumerate(ready.quantizable):
        format = WeightFormat(str(bits if isinstance(bits, int) else bits(position)))
        weight = ready.model.get_submodule(name).weight
        simulated.set_weight(name, quantize_weight(weight, [format]).weights[format])
    simulated.bias_calls = bias_calls(ready.program, ready.sites, ready.quantizable)
    round_biases(simulated, {name: ready.layers[name].inputs for name in ready.quantizable})
    return simulated


def initializers(path: Path) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}


def operations_that_run(path: Path, folder: Path) -> list[str]:
    """Operator types of the graph onnxruntime really runs, in order."""
    optimized = folder / "optimized.onnx"
    open_session(path, save_optimized=optimized)
    return [node.op_type for node in onnx.load(optimized).graph.node]


def stored_bytes(path: Path, layer: str) -> bytes:
    """The bytes of a layer's codes as the file holds them: one initializer, or its planes from high to low bits."""
    found = initializers(path)
    if f"{layer}.weight" in found:
        return found[f"{layer}.weight"].raw_data
    names = sorted((n for n in found if n.startswith(f"{layer}.weight.plane")), reverse=True)
    return b"".join(found[name].raw_data for name in names)


def packed_bytes_of(codes: torch.Tensor, bits: int) -> bytes:
    return pack(codes, bits).numpy().tobytes()
