"""What a request will cost in time and memory, from timing one forward and the rounding of one layer."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from quantkit.graph.batches import batch_size
from quantkit.graph.intercept import tensors_of
from quantkit.graph.layers import groups_of, weight_of
from quantkit.graph.trace import run_model
from quantkit.pipeline.request import Request
from quantkit.quantizers.statistics import HESSIAN_BYTES
from quantkit.quantizers.weights import quantize_weight
from quantkit.sensitivity.measure import main_output, rows_of

PASSES = 3  # over the calibration data besides the measuring: layer inputs, two for activation ranges


@dataclass(frozen=True)
class Forecast:
    """``forwards`` of the sample set that the profile takes, seconds for them and for rounding, peak bytes."""

    forwards: int
    forward_seconds: float
    rounding_seconds: float
    peak_bytes: int

    @property
    def seconds(self) -> float:
        return (self.forwards + PASSES) * self.forward_seconds + self.rounding_seconds


def forecast(request: Request) -> Forecast:
    """Time one batch and the rounding of one layer, and scale them up. Good to a factor of about two."""
    samples = sum(batch_size(batch) for batch in request.batches)
    batch = request.batches[0]
    with torch.no_grad():
        seconds = math.inf
        for _ in range(2):  # the first run of a new shape also finds its kernels
            start = time.perf_counter()
            output = main_output(run_model(request.ready.model, batch))
            seconds = min(seconds, (time.perf_counter() - start) * samples / batch_size(batch))
    rows = rows_of(output)
    entries = len(request.entries())
    shifts = 4 * entries * rows.numel() * samples // batch_size(batch)
    return Forecast(entries + 1, seconds, _rounding_seconds(request), shifts + _held_bytes(request))


def _held_bytes(request: Request) -> int:
    """The model twice, the calibration inputs twice (as given and mixed), and the Hessians held at once."""
    model = sum(t.numel() * t.element_size() for t in request.ready.model.state_dict().values())
    inputs = sum(t.numel() * t.element_size() for batch in request.batches for t in tensors_of(batch))
    hessians = sum(
        8 * groups_of(request.ready.model, name) * _width(request, name) ** 2 for name in request.candidates
    )
    return 2 * model + 2 * inputs + min(hessians, HESSIAN_BYTES)


def _width(request: Request, layer: str) -> int:
    return weight_of(request.ready.model, layer)[0].numel()


def _work(request: Request, layer: str) -> int:
    """What rounding a layer by GPTQ costs, in multiplications per format."""
    return weight_of(request.ready.model, layer).numel() * _width(request, layer)


def _rounding_seconds(request: Request) -> float:
    """Rounding time of all layers, scaled from the layer of median work, rounded once on white inputs."""
    layers = sorted(request.candidates, key=lambda name: _work(request, name))
    name = layers[len(layers) // 2]
    groups, width = groups_of(request.ready.model, name), _width(request, name)
    hessian = None
    if request.settings["rounding"] != "nearest":
        hessian = torch.eye(width, dtype=torch.float64).repeat(groups, 1, 1)
    formats = list(dict.fromkeys(s.weight for s in request.candidates[name] if s.weight is not None))
    start = time.perf_counter()
    quantize_weight(weight_of(request.ready.model, name), formats, hessian, groups)
    seconds = time.perf_counter() - start
    return seconds * sum(_work(request, n) for n in layers) / max(1, _work(request, name))
