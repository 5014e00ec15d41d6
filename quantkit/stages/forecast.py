"""What a request will cost in time and memory, from timing one forward and the rounding of one layer."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from quantkit.program.inputs import batch_size
from quantkit.program.intercept import tensors_of
from quantkit.program.record import run_model
from quantkit.rounding import Moments, rounding_of
from quantkit.rounding.blocks import HESSIAN_BYTES
from quantkit.rounding.weights import quantize_weight
from quantkit.sensitivity import COSTS
from quantkit.sensitivity.curvature import GRAPH_SAMPLES
from quantkit.sensitivity.outputs import OutputRule
from quantkit.sensitivity.registry import Workload
from quantkit.sensitivity.sketch import SHIFT_BYTES
from quantkit.stages.request import Request

PASSES = 4  # over the calibration data besides the measuring: layer inputs, two for activation ranges, rows seen
GRAPH_COPIES = 4  # how often a graph of second derivatives holds every activation


@dataclass(frozen=True)
class Forecast:
    """``forwards`` of the ``samples`` that the profile takes for so many ``formats``, seconds for them and for
    rounding, peak bytes beyond one forward, and ``rule``, by which outputs are compared.
    """

    formats: int
    forwards: int
    samples: int
    forward_seconds: float
    rounding_seconds: float
    peak_bytes: int
    rule: OutputRule

    @property
    def seconds(self) -> float:
        return (self.forwards + PASSES) * self.forward_seconds + self.rounding_seconds

    def __str__(self) -> str:
        return (
            f"measuring {self.formats} formats: about {self.forwards} forwards of {self.samples} samples, "
            f"{self.seconds:.0f} s with {self.rounding_seconds:.0f} s of rounding; memory at most about "
            f"{self.peak_bytes / 1e6:,.1f} MB beyond one forward"
        )


def forecast(request: Request) -> Forecast:
    """Time one batch and the rounding of one layer, and scale them up. Good to a factor of about two."""
    samples = sum(batch_size(batch) for batch in request.batches)
    batch = request.batches[0]
    with torch.no_grad():
        seconds = math.inf
        for _ in range(2):  # the first run of a new shape also finds its kernels
            start = time.perf_counter()
            result = run_model(request.ready.model, batch)
            seconds = min(seconds, (time.perf_counter() - start) * samples / batch_size(batch))
    formats = len(request.entries())
    cost = COSTS[request.settings["sensitivity"]]
    work = Workload(formats, len(request.candidates) + len(request.ready.sites), samples)
    rule = OutputRule.of(request.ready.model, result, batch, request.settings["loss"])
    outputs = 4 * sum(rows.numel() for rows in rule.rows(result, batch)) * samples // batch_size(batch)
    held = _held_bytes(request) + outputs
    held += min(formats * outputs, SHIFT_BYTES) if cost.keeps_shifts else 0
    held += _graph_bytes(request) if cost.keeps_graph else 0
    return Forecast(formats, math.ceil(cost.forwards(work)), samples, seconds, _rounding_seconds(request), held, rule)


def _graph_bytes(request: Request) -> int:
    """Every value the model computes for the samples of one graph, several times."""
    program = request.ready.program
    elements = sum(math.prod(program.shape[number][1:]) for number in program.producer)
    return 4 * GRAPH_COPIES * GRAPH_SAMPLES * elements


def _held_bytes(request: Request) -> int:
    """The model twice, the calibration inputs twice (as given and mixed), and the Hessians held at once."""
    model = sum(t.numel() * t.element_size() for t in request.ready.model.state_dict().values())
    inputs = sum(t.numel() * t.element_size() for batch in request.batches for t in tensors_of(batch))
    hessians = sum(
        8 * weight.groups * request.ready.weights.inputs(name) ** 2
        for name in request.candidates
        if (weight := request.ready.weights.layers[name]).reads_rows
    )
    return 2 * model + 2 * inputs + min(hessians, HESSIAN_BYTES)


def _work(request: Request, layer: str) -> int:
    """What rounding a layer by GPTQ costs, in multiplications per format."""
    return math.prod(request.ready.weights.layers[layer].shape) * request.ready.weights.inputs(layer)


def _rounding_seconds(request: Request) -> float:
    """Rounding time of all layers, scaled from the layer of median work, rounded once on white inputs."""
    rows = [name for name in request.candidates if request.ready.weights.layers[name].reads_rows]
    layers = sorted(rows or request.candidates, key=lambda name: _work(request, name))
    name = layers[len(layers) // 2]
    groups, width = request.ready.weights.layers[name].groups, request.ready.weights.inputs(name)
    moments = None
    if rounding_of(request.settings["rounding"]).hessian:
        moments = Moments(torch.eye(width, dtype=torch.float64, device="cpu").repeat(groups, 1, 1))
    formats = list(dict.fromkeys(s.weight for s in request.candidates[name] if s.weight is not None))
    start = time.perf_counter()
    quantize_weight(request.ready.weights[name], formats, moments, groups, request.settings["rounding"])
    seconds = time.perf_counter() - start
    return seconds * sum(_work(request, n) for n in layers) / max(1, _work(request, name))
