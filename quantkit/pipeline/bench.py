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
from quantkit.flow import Execution, Operation, execute
from quantkit.formats import Scheme
from quantkit.graph.batches import Batch, batch_size, first_samples
from quantkit.graph.flow import operations_of
from quantkit.graph.layers import groups_of, weight_of
from quantkit.graph.sites import place_sites
from quantkit.kernels.reference import QuantizedWeight, SiteRange
from quantkit.latency import LatencyTable
from quantkit.pipeline.request import DEFAULT_TARGET, TargetName, calibration_batches, digest_shapes
from quantkit.progress import notice
from quantkit.quantizers.activation_ranges import minmax_range
from quantkit.quantizers.simulate import SimulatedModel
from quantkit.quantizers.statistics import site_histograms
from quantkit.quantizers.weights import quantize_weight
from quantkit.targets import Target
from quantkit.transforms.prepare import Prepared, prepare
from quantkit.version import VERSION

LATENCY_BATCH = 32
SECONDS = 40.0
RANDOM_PAIRS = 5


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
    become 8-bit integers when a file is loaded, so one width is timed. Raises InvalidRequest for a model that cannot
    be exported.
    """
    for name, value in {"threads": threads, "batch": batch}.items():
        if value < 1:
            raise InvalidRequest(f"{name}={value}: at least 1.")
    goal = Target.load(target)
    example = calibration_batches(model, calibration, max(batch, 2))[0]
    stand = _stand(prepare(model, [example], goal), goal, example, progress)
    mixtures = mixtures_of(stand.ready.quantizable, seed)
    inputs = first_samples(example, batch)
    with TemporaryDirectory() as folder:
        table = _table(stand, mixtures, inputs, threads, seconds, Path(folder))
    notice(f"measured {len(mixtures)} mixtures of float and quantized layers on {threads} thread(s)")
    return replace(goal, latency=table)


@dataclass(frozen=True)
class _Stand:
    """A prepared model with 8-bit codes for everything that can have them."""

    ready: Prepared
    target: Target
    example: Batch
    operations: tuple[Operation, ...]
    weights: dict[str, QuantizedWeight]
    ranges: dict[str, SiteRange]

    def simulated(self, layers: Sequence[str]) -> SimulatedModel:
        """The model with these layers quantized, and the sites that they need."""
        ready = self.ready
        sites = place_sites(ready.model, ready.trace, self.target, layers)
        weights = {name: self.weights[name] for name in layers}
        return SimulatedModel(ready.model, sites, weights, {site.name: self.ranges[site.name] for site in sites})


def _stand(ready: Prepared, target: Target, example: Batch, progress: bool) -> _Stand:
    scheme = max(map(Scheme.parse, target.default_schemes), key=lambda s: s.weight.bits if s.weight else 0)
    assert scheme.weight is not None and scheme.activation is not None
    weights = {
        name: quantize_weight(
            weight_of(ready.model, name), [scheme.weight], None, groups_of(ready.model, name)
        ).weights[scheme.weight]
        for name in ready.quantizable
    }
    histograms = site_histograms(ready.model, ready.sites, [example], progress)
    ranges = {name: minmax_range(histogram, scheme.activation.bits) for name, histogram in histograms.items()}
    return _Stand(ready, target, example, operations_of(ready.trace, ready.sites, target), weights, ranges)


def mixtures_of(layers: Sequence[str], seed: int) -> list[list[str]]:
    """Sets of layers to quantize, distinct: none, all, all but the first or last, halves, and random ones with their
    complements, so that each layer is seen both ways between neighbours of both kinds.
    """
    draw, half = random.Random(seed), len(layers) // 2
    found = [[], list(layers), list(layers[1:]), list(layers[:-1]), list(layers[:half]), list(layers[half:])]
    for _ in range(RANDOM_PAIRS):
        chosen = {name for name in layers if draw.random() < 0.5}
        found += [[n for n in layers if n in chosen], [n for n in layers if n not in chosen]]
    return [list(one) for one in dict.fromkeys(map(tuple, found))]


def _table(
    stand: _Stand, mixtures: Sequence[Sequence[str]], inputs: Batch, threads: int, seconds: float, folder: Path
) -> LatencyTable:
    from quantkit.export.bench import times_of
    from quantkit.export.marks import mark_graph
    from quantkit.export.node_times import measure_files
    from quantkit.export.onnx_writer import write_unchecked
    from quantkit.export.owners import owners_of

    ready, operations = stand.ready, stand.operations
    marked = mark_graph(stand.simulated(ready.quantizable), stand.example)
    owners = owners_of(marked, operations, {str(site.place): site.name for site in ready.sites})
    executions: list[Execution] = [execute(operations, layers) for layers in mixtures]
    paths = [
        write_unchecked(stand.simulated(layers), marked, folder / f"{k}.onnx") for k, layers in enumerate(mixtures)
    ]
    measured = measure_files(paths, inputs, threads, seconds)
    names = [op.name for op in operations if op.kind != "float"]
    elements = {site.name: Size(site.shape).numel() for site in ready.sites}
    times = times_of(measured, executions, owners, list(dict.fromkeys(names)), elements)
    return LatencyTable(
        digest_shapes(ready),
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
