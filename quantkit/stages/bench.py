"""Cost by measurement: what a model's layers, operations and conversions take in onnxruntime on this machine."""

from __future__ import annotations

import platform
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Size, nn

from quantkit.errors import InvalidRequest
from quantkit.formats import Scheme, WeightFormat
from quantkit.numbers.uniform import QuantizedWeight, SiteRange
from quantkit.plan import digest_shapes
from quantkit.plan.latency import FULL_BITS, LatencyTable
from quantkit.plan.operations import Operation, execute
from quantkit.program.inputs import Batch, batch_size, first_samples
from quantkit.program.operations import operations_of
from quantkit.program.sites import place_sites
from quantkit.progress import notice
from quantkit.ranges.activations import minmax_range
from quantkit.ranges.statistics import site_histograms
from quantkit.rounding.weights import quantize_weight
from quantkit.simulation.model import SimulatedModel
from quantkit.stages.inputs import calibration_batches
from quantkit.stages.request import DEFAULT_TARGET, TargetName
from quantkit.targets import Target
from quantkit.transforms.prepare import Prepared, prepare
from quantkit.version import VERSION

LATENCY_BATCH = 32
SECONDS = 40.0
RANDOM_SETS = 4
CHANGES = 0.4
Mixture = dict[str, int]  # layer to quantize -> bits of its weight


def bench(
    model: nn.Module,
    calibration: Any,
    *,
    target: TargetName = DEFAULT_TARGET,
    threads: int = 1,
    batch: int = LATENCY_BATCH,
    seconds: float = SECONDS,
    seed: int = 0,
    progress: bool = True,
) -> Target:
    """The target with the latency table of ``model`` on this machine, from ``seconds`` of runs in onnxruntime.

    ``calibration``: as for ``profile``; its first ``batch`` samples are what the model runs on. Weights below 8 bits
    become 8-bit integers when a file is loaded and run on one kernel, so two widths are timed: the widest below 8 bits
    and full bytes. Raises InvalidRequest for a model that cannot be exported.
    """
    for name, value in {"threads": threads, "batch": batch}.items():
        if value < 1:
            raise InvalidRequest(f"{name}={value}: at least 1.")
    goal = Target.load(target).resolved()
    example = calibration_batches(model, calibration, max(batch, 2))[0]
    rig = _timing_rig(prepare(model, [example], goal), goal, example, progress)
    mixtures = mixtures_of(rig.ready.quantizable, rig.widths, seed)
    inputs = first_samples(example, batch)
    with TemporaryDirectory() as folder:
        table = _table(rig, mixtures, inputs, threads, seconds, Path(folder))
    notice(f"measured {len(mixtures)} mixtures of float and quantized layers on {threads} thread(s)")
    return replace(goal, latency=table)


@dataclass(frozen=True)
class _TimingRig:
    """A prepared model with codes for everything that can have them, by the bits of layers' weights."""

    ready: Prepared
    target: Target
    example: Batch
    operations: tuple[Operation, ...]
    widths: tuple[int, ...]
    weights: dict[tuple[str, int], QuantizedWeight]
    ranges: dict[str, SiteRange]

    def simulated(self, mixture: Mixture) -> SimulatedModel:
        """The model with these layers quantized, and the sites that they need, on the CPU."""
        ready = self.ready
        layers = [name for name in ready.quantizable if name in mixture]
        sites = place_sites(ready.model, ready.program, self.target, layers, ready.float_sums)
        weights = {name: self.weights[name, bits] for name, bits in mixture.items()}
        ranges = {site.name: self.ranges[site.name] for site in sites}
        return SimulatedModel(ready.model, sites, weights, ranges, ready.weights).on_cpu()


def _timing_rig(ready: Prepared, target: Target, example: Batch, progress: bool) -> _TimingRig:
    schemes = [Scheme.parse(scheme) for scheme in target.default_schemes]
    formats = {s.weight.bits: s.weight for s in schemes if s.weight is not None}
    narrow = [bits for bits in formats if bits < FULL_BITS]
    widths = (*([max(narrow)] if narrow else []), *(bits for bits in formats if bits >= FULL_BITS))
    weights = {
        (name, bits): weight
        for name in ready.quantizable
        for weight, bits in _rounded(ready, name, [formats[bits] for bits in widths])
    }
    histograms = site_histograms(ready.model, ready.sites, [example], progress)
    act = max(s.activation.bits for s in schemes if s.activation is not None)
    ranges = {name: minmax_range(histogram, act) for name, histogram in histograms.items()}
    return _TimingRig(
        ready, target, example, operations_of(ready.program, ready.sites, target), widths, weights, ranges
    )


def _rounded(ready: Prepared, name: str, formats: Sequence[WeightFormat]) -> list[tuple[QuantizedWeight, int]]:
    found = quantize_weight(ready.weights[name], formats, None, ready.weights.layers[name].groups).weights
    return [(weight, fmt.bits) for fmt, weight in found.items() if weight.integer]


def mixtures_of(layers: Sequence[str], widths: Sequence[int], seed: int) -> list[Mixture]:
    """Layers to quantize and their bits, each mixture different: none; all, all but the first or last, and halves at
    the first width; all at the others; and random ones in sets in which every layer is float once and has each width
    once, in runs of layers alike.
    """
    draw, half, count = random.Random(seed), len(layers) // 2, len(widths) + 1
    parts = [[], layers, layers[1:], layers[:-1], layers[:half], layers[half:]]
    found = [dict.fromkeys(part, widths[0]) for part in parts]
    found += [dict.fromkeys(layers, bits) for bits in widths[1:]]
    for _ in range(RANDOM_SETS):
        ways = _runs(layers, [None, *widths], draw)
        found += [{n: bits for n, own in ways.items() if (bits := own[k]) is not None} for k in range(count)]
    return [dict(one) for one in dict.fromkeys(tuple(mixture.items()) for mixture in found)]


def _runs(layers: Sequence[str], ways: Sequence[int | None], draw: random.Random) -> dict[str, list[int | None]]:
    """For every layer the ways in an order: that of the layer before it more often than a new one, since plans change
    format a few times and not at every layer.
    """
    found: dict[str, list[int | None]] = {}
    order = draw.sample(ways, len(ways))
    for name in layers:
        if draw.random() < CHANGES:
            order = draw.sample(ways, len(ways))
        found[name] = order
    return found


def _table(
    rig: _TimingRig, mixtures: Sequence[Mixture], inputs: Batch, threads: int, seconds: float, folder: Path
) -> LatencyTable:
    from quantkit.backends.onnxruntime.bench import times_of
    from quantkit.backends.onnxruntime.marks import mark_graph
    from quantkit.backends.onnxruntime.node_times import measure_files
    from quantkit.backends.onnxruntime.owners import owners_of
    from quantkit.backends.onnxruntime.writer import ExportOptions, write_unchecked

    ready, operations = rig.ready, rig.operations
    marked = mark_graph(rig.simulated(dict.fromkeys(ready.quantizable, rig.widths[0])), rig.example)
    owners = owners_of(marked, operations, {str(place): site.name for site in ready.sites for place in site.places})
    executions = [
        execute(operations, mixture, [name for name, bits in mixture.items() if bits >= FULL_BITS])
        for mixture in mixtures
    ]
    options = ExportOptions(rig.target.instruction_set, domains=rig.target.operator_domains)
    paths = [
        write_unchecked(rig.simulated(mixture), marked, folder / f"{k}.onnx", options)
        for k, mixture in enumerate(mixtures)
    ]
    measured = measure_files(paths, inputs, threads, seconds)
    names = [op.name for op in operations if op.kind != "float"]
    elements = {site.name: Size(site.shape).numel() for site in ready.sites}
    times = times_of(measured, executions, owners, list(dict.fromkeys(names)), elements)
    return LatencyTable(
        digest_shapes(ready.layers),
        threads,
        batch_size(inputs),
        times.rest_ns,
        times.operations,
        times.sites,
        _notes(measured),
    )


def _notes(measured: Sequence[Any]) -> dict[str, Any]:
    """Where, when and how."""
    import onnxruntime

    return {
        "host": platform.node(),
        "machine": f"{platform.machine()} {_processor()}".strip(),
        "system": f"{platform.system()} {platform.release()}",
        "date": date.today().isoformat(),
        "quantkit": VERSION,
        "onnxruntime": onnxruntime.__version__,
        "torch": str(torch.__version__),
        "mixtures": len(measured),
        "rounds": measured[0].rounds,
        "clock": "time that the one thread worked" if measured[0].threads == 1 else "time that passed",
        "float_ms": round(measured[0].total_ns / 1e6, 4),
        "quantized_ms": round(measured[1].total_ns / 1e6, 4),
    }


def _processor() -> str:
    """The processor's own name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.processor()
