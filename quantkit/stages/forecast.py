"""What a profile will cost in time and memory, from timing one forward and the machine's speed at rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quantkit.numbers.uniform import SiteRange
from quantkit.program.inputs import Batch, batch_size
from quantkit.program.intercept import tensors_of
from quantkit.program.record import run_model
from quantkit.program.sites import Site
from quantkit.program.updates import plain_mode, restored
from quantkit.ranges.statistics import hessian_bytes
from quantkit.rounding import rounding_of
from quantkit.rounding.request import RoundingOptions
from quantkit.sensitivity import COSTS
from quantkit.sensitivity.curvature import GRAPH_BYTES, GRAPH_SAMPLES
from quantkit.sensitivity.damage import SLICE_ELEMENTS
from quantkit.sensitivity.float_outputs import HELD_BYTES
from quantkit.sensitivity.outputs import OutputRule, Outputs
from quantkit.sensitivity.registry import Workload
from quantkit.sensitivity.sketch import SHIFT_BYTES
from quantkit.simulation.model import at_sites, run_with
from quantkit.stages.footprint import (
    FLOAT,
    by_loss_bytes,
    collecting_bytes,
    counting_bytes,
    fitting,
    forward_bytes,
    largest_value,
    rounding_bytes,
    rounding_seconds,
    together,
    value_bytes,
)
from quantkit.stages.machine import range_seconds, seconds_of
from quantkit.stages.request import Request
from quantkit.transforms.prepare import Prepared

PASSES = 2  # of the float model beside the measuring: layer inputs, rows seen
PASSES_AT_SITES = 4  # two for activation ranges, where counting takes as long again
GRAPH_COPIES = 4  # how often a graph of second derivatives holds every activation
_QUANTIZING = 3  # copies of a site's values while they are quantized
_COMPARING = 6  # copies of one batch's outputs while they are compared, in float64
_COMPARED = 2 * _COMPARING * FLOAT * SLICE_ELEMENTS  # at most: it is some rows at a time
_SOFTMAXES = 6  # that comparing outputs amounts to
_ANY_RANGE = SiteRange(0.05, 128)


@dataclass(frozen=True)
class Forecast:
    """``forwards`` of the ``samples`` that the profile takes for so many ``formats``, seconds of the processor for
    them all and for rounding, peak bytes beyond the model and its inputs, and ``rule``, by which outputs are compared.
    """

    formats: int
    forwards: int
    samples: int
    measuring_seconds: float
    rounding_seconds: float
    peak_bytes: int
    rule: OutputRule

    @property
    def seconds(self) -> float:
        return self.measuring_seconds + self.rounding_seconds

    def __str__(self) -> str:
        return (
            f"measuring {self.formats} formats: about {self.forwards} forwards of {self.samples} samples, "
            f"{self.seconds:.0f} s of the processor with {self.rounding_seconds:.0f} s of rounding; memory at most "
            f"about {self.peak_bytes / 1e6:,.0f} MB beyond the model and its inputs"
        )


def forecast(request: Request) -> Forecast:
    """Time one batch, and scale it up. Good to a factor of two."""
    samples = sum(batch_size(batch) for batch in request.batches)
    ready, batch = request.ready, max(request.batches, key=batch_size)
    with torch.no_grad():
        result = run_model(ready.model, batch)
    rule = OutputRule.of(ready.model, result, batch, request.settings["loss"])
    comparing = _comparing_seconds(rule.rows(result, batch))
    plain, quantized = ((x + comparing) * samples / batch_size(batch) for x in forward_seconds(ready, batch))
    cost = COSTS[request.settings["sensitivity"]]
    layers, sites = len(request.candidates), len(ready.sites)
    formats = len(request.entries())
    forwards = math.ceil(cost.forwards(Workload(formats, layers + sites, samples)))
    at_sites = sites * len(request.site_formats)

    # one site is quantized while its formats are measured, all of them in what is measured beside single formats
    singly = (formats - at_sites) * plain + at_sites * (plain + quantized) / 2
    measured = singly * min(1, forwards / max(1, formats)) + max(0, forwards - formats) * quantized
    seconds = measured + PASSES * plain + PASSES_AT_SITES * quantized * (at_sites > 0) + at_sites * range_seconds()
    options = rounding_options(request)
    rounding = _rounding_seconds(request, samples, options)
    return Forecast(formats, forwards, samples, seconds, rounding, _peak_bytes(request, options), rule)


def rounding_options(request: Request) -> RoundingOptions:
    """How a profile rounds within the memory that it is given."""
    memory = request.settings.get("memory") if request.batches else None
    return fitting(memory, RoundingOptions(request.settings["rounding"]), partial(_peak_bytes, request))


@torch.no_grad()
def forward_seconds(ready: Prepared, batch: Batch) -> tuple[float, float]:
    """Seconds of the processor for one batch, in float and with every site quantized."""

    def change(site: Site, x: Tensor) -> Tensor:
        return _ANY_RANGE.fake_quantize(x)

    def run() -> None:
        with plain_mode(ready.model), restored(ready.model, ready.program.updated):
            run_with(ready.model, at_sites(ready.sites, change), *batch)

    plain = seconds_of(lambda: run_model(ready.model, batch))
    return plain, max(plain, seconds_of(run))


def _comparing_seconds(outputs: Outputs) -> float:
    """Seconds to compare the outputs of a batch."""
    some = [rows[: max(1, SLICE_ELEMENTS // rows.shape[-1])] for rows in outputs]
    parts = sum(len(rows) for rows in outputs) / max(1, sum(len(rows) for rows in some))

    def softmaxes() -> None:
        for rows in some:
            rows.double().log_softmax(-1)

    return _SOFTMAXES * parts * seconds_of(softmaxes)


def _peak_bytes(request: Request, options: RoundingOptions) -> int:
    """The most that is held at a time: while rounding, while ranges are found, or while formats are measured."""
    sizes = [batch_size(batch) for batch in request.batches]
    samples, batch = sum(sizes), max(sizes)
    program, cost = request.ready.program, COSTS[request.settings["sensitivity"]]
    weights = {name: request.ready.weights.layers[name] for name in request.candidates}
    formats = request.entries()
    numbers = {name: math.prod(weight.shape) for name, weight in weights.items()}
    codes = sum(numbers.get(owner, 0) for owner, _ in formats)
    forward, value = forward_bytes(program, batch), largest_value(program, batch)
    rounding, most = max(rounding_bytes(weight, options) for weight in weights.values()), options.hessian_bytes
    if rounding_of(options.name).hessian:
        hessians = {name: hessian_bytes(weight, most) for name, weight in weights.items()}
        collecting = max(collecting_bytes(program, name, batch, most) for name in weights)
        factoring = max(rounding_bytes(weight, options) - hessians[name] for name, weight in weights.items())
        rounding = min(sum(hessians.values()), most) + max(forward + collecting, factoring)

    rounding += by_loss_bytes(program, list(weights), options)
    inputs = sum(t.numel() * t.element_size() for one in request.batches for t in tensors_of(one))
    outputs = together(value_bytes(program, batch), program.outputs)
    every = outputs * samples // batch
    shifts = min(len(formats) * every, SHIFT_BYTES) * cost.keeps_shifts
    if every > HELD_BYTES and request.session.standing is not None:
        every = HELD_BYTES + outputs  # made again from what enters the last layer
    most = max(GRAPH_BYTES, forward_bytes(program, 1))
    graph = GRAPH_COPIES * min(forward_bytes(program, GRAPH_SAMPLES), most) * cost.keeps_graph
    comparing = outputs + min((_COMPARING - 1) * outputs, _COMPARED)
    measuring = forward + _QUANTIZING * value + comparing + FLOAT * sum(numbers.values())
    return codes + max(rounding, counting_bytes(program, batch), inputs + every + shifts + measuring + graph)


def _rounding_seconds(request: Request, samples: int, options: RoundingOptions) -> float:
    """Seconds to round every candidate of every layer."""
    return sum(
        rounding_seconds(request.ready.program, name, len({s.weight for s in schemes}), samples, options)
        for name, schemes in request.candidates.items()
    )
