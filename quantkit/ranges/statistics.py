"""What quantizers learn from calibration data, streamed: ranges of sites and Hessians of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import InvalidRequest
from quantkit.program.arguments import leaves_of
from quantkit.program.inputs import Batch
from quantkit.program.intercept import OpKey
from quantkit.program.layers import LayerCall, LayerWeight, Weights
from quantkit.program.padding import Given, Padding, as_rows
from quantkit.program.program import Program
from quantkit.program.sites import Site
from quantkit.program.updates import plain_mode, restored
from quantkit.progress import track
from quantkit.ranges.activations import Extremes, Histogram
from quantkit.rounding.blocks import HESSIAN_BYTES, Blocks, blocks_of
from quantkit.rounding.layer_inputs import LayerInputs, layer_inputs
from quantkit.rounding.moments import Moments
from quantkit.rounding.recurrent_inputs import recurrent_inputs
from quantkit.simulation.model import SimulatedModel, at_sites, run_with

ROWS = 1 << 15


def site_histograms(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[Batch],
    progress: bool = True,
    padding: Padding | None = None,
) -> dict[str, Histogram]:
    """A histogram of every site's values over ``batches``, without those under ``padding``: one pass for extremes, one
    to count.

    Raises InvalidRequest where a site's values are not finite: no integer range covers them.
    """
    extremes = {site.name: Extremes() for site in sites}
    if not sites:
        return {}

    def widen(site: Site, x: Tensor) -> None:
        if not torch.isfinite(x).all():
            raise InvalidRequest(
                f"The model computes NaN or infinite values at {site.name} on the calibration inputs, where integer "
                "codes are asked for. Repair the model or the inputs, or keep the layers around it float by a rule."
            )
        extremes[site.name] = extremes[site.name].seen(x)

    visit(model, sites, widen, track(batches, "activation ranges", enabled=progress), padding)
    histograms = {name: Histogram.empty(found) for name, found in extremes.items()}

    def count(site: Site, x: Tensor) -> None:
        histograms[site.name] = histograms[site.name].seen(x)

    visit(model, sites, count, track(batches, "activation histograms", enabled=progress), padding)
    return histograms


def visit(
    model: nn.Module,
    sites: Sequence[Site],
    see: Callable[[Site, Tensor], None],
    batches: Iterable[Batch],
    padding: Padding | None = None,
) -> None:
    """Show every site's values over ``batches`` to ``see``, without those under ``padding``."""
    given: Given = {}

    once = [replace(site, copies=()) for site in sites]  # several calls may read the same values

    def shown(site: Site, x: Tensor) -> Tensor:
        see(site, x if padding is None else padding.kept(padding.places[site.place], x, given))
        return x

    for args, kwargs in batches:
        given = {} if padding is None else padding.given((args, kwargs))
        with plain_mode(model), restored(model):
            run_with(model, at_sites(once, shown), args, kwargs)


class _Reached(Exception):
    """The last layer whose inputs are wanted has been reached: the rest of the forward is not needed."""


def layer_hessians(
    model: SimulatedModel,
    program: Program,
    layers: Sequence[str],
    batches: Iterable[Batch],
    most: int = HESSIAN_BYTES,
    padding: Padding | None = None,
) -> dict[str, Moments]:
    """Sum of X^T X over the inputs X of each layer, (groups, K, K) float64, as ``model`` computes them now, without
    rows under ``padding``; in blocks where that of a layer is beyond ``most`` bytes.

    Products are taken in float32 over slices of rows and summed in float64. Of a convolution with many positions some
    are drawn, by a fixed seed. A forward stops at the last layer asked for.
    """
    watched = _watched(program, layers)
    if not watched:
        return {}
    blocks = {name: blocks_of(program.weights[name], most) for read in watched.values() for name, _ in read}
    steps = {step.key: step for step in program.steps}
    last = max(watched, key=list(steps).index)
    sums: dict[str, Tensor] = {}
    draws = torch.Generator().manual_seed(0)

    given: Given = {}

    def before(key: OpKey, args: Any, kwargs: Any) -> None:
        for name, call in watched.get(key, ()):
            if program.kinds[name] == "recurrent":
                read = recurrent_inputs(program, name, steps[key], args)
            else:
                rows = as_rows if padding is None else padding.rows_of(call.input, given)
                read = layer_inputs(program.kinds[name], args, kwargs, draws, call.source, rows)
            if read is not None:
                accumulate(sums, name, read, blocks[name])
        if key == last:
            raise _Reached

    with torch.no_grad():
        for args, kwargs in batches:
            given = {} if padding is None else padding.given((args, kwargs))
            try:
                model.run(args, kwargs, before)
            except _Reached:
                continue
    return {name: Moments(found, count=blocks[name].count) for name, found in sums.items()}


def _watched(program: Program, layers: Sequence[str]) -> dict[OpKey, list[tuple[str, LayerCall]]]:
    """The calls of those layers whose inputs are looked at, by key."""
    watched: dict[OpKey, list[tuple[str, LayerCall]]] = {}
    for name in layers:
        for call in program.calls.get(name, ()) if program.weights[name].inputs_seen else ():
            watched.setdefault(call.key, []).append((name, call))
    return watched


def accumulate(
    sums: dict[str, Tensor], name: str, read: LayerInputs, blocks: Blocks, others: LayerInputs | None = None
) -> None:
    """Add X^T X of each block of the inputs X that a layer ``read``, or Y^T X, Y being ``others``, to a named sum."""
    if name not in sums:
        shape = (read.groups * blocks.count, blocks.width, blocks.width)
        sums[name] = torch.zeros(shape, dtype=torch.float64, device="cpu")
    for block, span in enumerate(blocks.spans(read.width)):
        x = read.columns(span)
        y = x if others is None else others.columns(span)
        total = sums[name][block :: blocks.count, : x.shape[-1], : x.shape[-1]]
        for rows, others_rows in zip(x.float().split(ROWS, dim=1), y.float().split(ROWS, dim=1), strict=True):
            total += (others_rows.transpose(1, 2) @ rows).double().cpu()


def rows_seen(
    model: SimulatedModel, program: Program, layers: Sequence[str], batches: Iterable[Any]
) -> dict[str, int]:
    """How many inputs each layer gets over ``batches``: samples of convolutions, rows of other layers. Layers behind
    a choice that the network makes by its data, as experts are, may get few or none.
    """
    watched: dict[OpKey, list[tuple[str, int]]] = {}  # a recurrent call has several matrices
    for name in layers:
        for call in program.calls.get(name, ()):
            watched.setdefault(call.key, []).append((name, call.source))
    counts = dict.fromkeys(layers, 0)

    def before(key: OpKey, args: Any, kwargs: Any) -> None:
        for name, source in watched.get(key, ()):
            x = [leaf for leaf in leaves_of((args, kwargs)) if isinstance(leaf, Tensor)][source]
            kind = program.kinds[name]
            whole = kind.startswith("conv") or "embedding" in kind
            counts[name] += len(x) if whole else x.numel() // max(1, x.shape[-1])

    with torch.no_grad():
        for args, kwargs in batches:
            model.run(args, kwargs, before)
    return counts


def hessian_bytes(weight: LayerWeight, most: int = HESSIAN_BYTES) -> int:
    """Bytes of a layer's X^T X, in blocks where all of it is beyond ``most``; none where it is not looked at."""
    blocks = blocks_of(weight, most)
    return 8 * weight.groups * blocks.count * blocks.width**2 * weight.inputs_seen


def in_memory_bound(weights: Weights, layers: Sequence[str], most: int = HESSIAN_BYTES) -> Iterator[list[str]]:
    """Split ``layers`` into runs whose Hessians stay within ``most`` bytes together."""
    run: list[str] = []
    held = 0
    for name in layers:
        size = hessian_bytes(weights.layers[name], most)
        if run and held + size > most:
            yield run
            run, held = [], 0
        run.append(name)
        held += size
    if run:
        yield run
