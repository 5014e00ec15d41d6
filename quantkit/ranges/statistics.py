"""What quantizers learn from calibration data, streamed: ranges of sites and Hessians of layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import InvalidRequest
from quantkit.program.arguments import leaves_of
from quantkit.program.intercept import OpKey
from quantkit.program.layers import Weights
from quantkit.program.program import Program
from quantkit.program.sites import Site
from quantkit.program.updates import plain_mode, restored
from quantkit.progress import track
from quantkit.ranges.activations import Extremes, Histogram
from quantkit.rounding.layer_inputs import input_columns
from quantkit.simulation.model import SimulatedModel, at_sites, run_with

ROWS = 1 << 15
HESSIAN_BYTES = 1 << 30


def site_histograms(
    model: nn.Module, sites: Sequence[Site], batches: Sequence[Any], progress: bool = True
) -> dict[str, Histogram]:
    """A histogram of every site's values over ``batches`` of (args, kwargs): one pass for extremes, one to count.

    Raises InvalidRequest where a site's values are not finite: no integer range covers them.
    """
    extremes = {site.name: Extremes() for site in sites}
    if not sites:
        return {}

    def widen(site: Site, x: Tensor) -> Tensor:
        if not torch.isfinite(x).all():
            raise InvalidRequest(
                f"The model computes NaN or infinite values at {site.name} on the calibration inputs, where integer "
                "codes are asked for. Repair the model or the inputs, or keep the layers around it float by a rule."
            )
        extremes[site.name] = extremes[site.name].seen(x)
        return x

    _visit(model, sites, widen, track(batches, "activation ranges", enabled=progress))
    histograms = {name: Histogram.empty(found) for name, found in extremes.items()}

    def count(site: Site, x: Tensor) -> Tensor:
        histograms[site.name] = histograms[site.name].seen(x)
        return x

    _visit(model, sites, count, track(batches, "activation histograms", enabled=progress))
    return histograms


def _visit(model: nn.Module, sites: Sequence[Site], see: Any, batches: Iterable[Any]) -> None:
    for args, kwargs in batches:
        with plain_mode(model), restored(model):
            run_with(model, at_sites(sites, see), args, kwargs)


class _Reached(Exception):
    """The last layer whose inputs are wanted has been reached: the rest of the forward is not needed."""


def layer_hessians(
    model: SimulatedModel, program: Program, layers: Sequence[str], batches: Iterable[Any]
) -> dict[str, Tensor]:
    """Sum of X^T X over the inputs X of each layer, (groups, K, K) float64, as ``model`` computes them now.

    Products are taken in float32 over slices of rows and summed in float64. Of a convolution with many positions some
    are drawn, by a fixed seed. A forward stops at the last layer asked for.
    """
    watched = {
        call.key: (name, call.source)
        for name in layers
        if program.weights[name].reads_rows
        for call in program.calls.get(name, ())
    }
    if not watched:
        return {}
    last = max(watched, key=[step.key for step in program.steps].index)
    sums: dict[str, Tensor] = {}
    draws = torch.Generator().manual_seed(0)

    def before(key: OpKey, args: Any, kwargs: Any) -> None:
        if key in watched:
            name, source = watched[key]
            accumulate(sums, name, input_columns(program.kinds[name], args, kwargs, draws, source))
            if key == last:
                raise _Reached

    with torch.no_grad():
        for args, kwargs in batches:
            try:
                model.run(args, kwargs, before)
            except _Reached:
                continue
    return sums


def accumulate(sums: dict[str, Tensor], name: str, columns: Tensor, others: Tensor | None = None) -> None:
    """Add X^T X of ``columns`` (groups, rows, K), or Y^T X with Y the ``others``, to the sum under a name."""
    if name not in sums:
        groups, _, width = columns.shape
        sums[name] = torch.zeros(groups, width, width, dtype=torch.float64, device="cpu")
    left = columns if others is None else others
    for rows, others_rows in zip(columns.float().split(ROWS, dim=1), left.float().split(ROWS, dim=1), strict=True):
        sums[name] += (others_rows.transpose(1, 2) @ rows).double().cpu()


def rows_seen(
    model: SimulatedModel, program: Program, layers: Sequence[str], batches: Iterable[Any]
) -> dict[str, int]:
    """How many inputs each layer gets over ``batches``: samples of convolutions, rows of other layers. Layers behind
    a choice that the network makes by its data, as experts are, may get few or none.
    """
    watched = {call.key: (name, call.source) for name in layers for call in program.calls.get(name, ())}
    counts = dict.fromkeys(layers, 0)

    def before(key: OpKey, args: Any, kwargs: Any) -> None:
        if key in watched:
            name, source = watched[key]
            x = [leaf for leaf in leaves_of((args, kwargs)) if isinstance(leaf, Tensor)][source]
            kind = program.kinds[name]
            whole = kind.startswith("conv") or "embedding" in kind
            counts[name] += len(x) if whole else x.numel() // max(1, x.shape[-1])

    with torch.no_grad():
        for args, kwargs in batches:
            model.run(args, kwargs, before)
    return counts


def in_memory_bound(weights: Weights, layers: Sequence[str]) -> Iterator[list[str]]:
    """Split ``layers`` into runs whose Hessians (groups x K x K doubles each) stay under 1 GiB together."""
    run: list[str] = []
    held = 0
    for name in layers:
        size = 8 * weights.layers[name].groups * weights.inputs(name) ** 2 * weights.layers[name].reads_rows
        if run and held + size > HESSIAN_BYTES:
            yield run
            run, held = [], 0
        run.append(name)
        held += size
    if run:
        yield run
