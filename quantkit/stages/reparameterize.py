"""Which parts of a transformer are quantized on finer grids than their runtime has, by rewriting the network so that
the runtime's grids stand for them: channels behind a LayerNorm, channels that layers read (``stages.scaled_reads``),
logarithmic probabilities (RepQuant, Li et al., arXiv 2402.05628).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from quantkit.budget import Budget
from quantkit.formats import WeightFormat
from quantkit.numbers.kinds import range_of
from quantkit.numbers.per_token import TokenRange
from quantkit.numbers.ratios import Ratio
from quantkit.numbers.uniform import SiteRange
from quantkit.plan import Plan
from quantkit.program.inputs import Batch
from quantkit.program.layers import Weights
from quantkit.program.sites import Site
from quantkit.ranges.activations import RANGES, Extremes, Histogram
from quantkit.ranges.channels import HELD_BACK, clipped_ranges, mse_ranges
from quantkit.ranges.statistics import visit
from quantkit.rounding.weights import quantize_weight
from quantkit.stages.formatted import Formatted
from quantkit.stages.options import ApplyOptions
from quantkit.stages.scaled_reads import ScaledRead, searched
from quantkit.store import Arrays, Artefacts, Codec
from quantkit.transforms.norm_ranges import Norm, Rewrite, rewritable_norms, rewrite
from quantkit.transforms.norms import normalizations
from quantkit.transforms.prepare import Prepared
from quantkit.transforms.reads import Read, scalable_reads
from quantkit.transforms.stored import FLOAT_BYTES

AUTO = "clip+reads+softmax"
N = TypeVar("N", Norm, Read)
ROWS = 8192  # of each norm's output that ranges are found on
ROW_BYTES = 1 << 28  # held at once


@dataclass(frozen=True)
class Reparameterization:
    """The norms to rewrite, the reads with ranges of their own, whether probabilities may get logarithmic codes, and
    notes on each norm and read and why.
    """

    rewrites: tuple[Rewrite, ...] = ()
    reads: tuple[ScaledRead, ...] = ()
    log_probabilities: bool = False
    notes: Mapping[str, str] = field(default_factory=dict)

    def rewrite(self, floats: Weights) -> None:
        """Rewrite a float model, whose weights these are, in place."""
        for change in self.rewrites:
            rewrite(floats, change)

    @property
    def ranges(self) -> dict[str, SiteRange | TokenRange]:
        """The ranges of the rewritten norms' sites, and of the reads."""
        found: dict[str, SiteRange | TokenRange] = {change.norm.site: change.found for change in self.rewrites}
        return found | {site: range for read in self.reads for site, range in read.ranges.items()}

    @property
    def stored_bytes(self) -> int:
        """What ratios take in a file, written for each site."""
        return FLOAT_BYTES * sum(len(one.found.ratio) * len(one.read.sites) for one in self.reads)

    @property
    def ratios(self) -> dict[str, Ratio]:
        """Layer -> by what the channels of its input are divided as it reads them."""
        return {layer: ratio for read in self.reads for layer, ratio in read.ratios.items()}


def within_bytes(options: ApplyOptions, plan: Plan) -> ApplyOptions:
    """The options for a plan that may have to fit so many bytes, which ratios of reads are not counted in."""
    limit = plan.provenance.get("budget")
    budget = None if limit is None else Budget.parse(str(limit))
    if budget is None or (budget.size is None and budget.file_size is None):
        return options
    parts = [part for part in _parts(options) if part != "reads"]
    return replace(options, reparameterization="+".join(parts) or "none")


def _parts(options: ApplyOptions) -> list[str]:
    return (AUTO if options.reparameterization == "auto" else options.reparameterization).split("+")


def reparameterization_of(formatted: Formatted, options: ApplyOptions, kept: Artefacts) -> Reparameterization:
    """What the options come to for a model that is still float; the model stays as it is.

    A norm is rewritten only where that lowers the error behind the layers that read it, with their weights rounded to
    nearest, on rows that were held back: scaling columns makes weights harder to quantize. Norms that are
    ``kept`` are not looked at again.
    """
    ready, batches, seed = formatted.ready, formatted.batches, options.seed
    weights, sites, ranges = formatted.weights, formatted.sites, options.ranges
    parts = _parts(options)
    if not batches or not sites:
        return Reparameterization()
    norms, notes = rewritable_norms(ready) if {"norm", "clip"} & set(parts) else ([], {})
    notes = {name: f"not rewritten: {reason}" for name, reason in notes.items()}
    rewrites = []

    def measured(norm: Norm, rows: Tensor) -> tuple[Rewrite, float, float]:
        bits = sites[norm.site].bits
        change = _change(ready.weights, norm, rows, bits, "clip" in parts, seed)
        one_range = RANGES[ranges](Histogram.empty(Extremes().seen(rows)).seen(rows), bits)
        before = _error(ready.weights, rows, weights, norm, one_range)
        return change, before, _error(ready.weights, rows, weights, norm, change)

    for norm, rows in _outputs_of(ready, norms, batches, seed):
        compute = partial(measured, norm, rows)
        change, before, after = kept.cached(f"norm: {norm.name}", norm.layers, compute, _codec(norm))
        notes[norm.name] = f"error behind it {after / before:.2f} of that with one range" if before else "exact"
        if after < before:
            rewrites.append(change)
        else:
            notes[norm.name] += ": not rewritten"
    found = Reparameterization(tuple(rewrites), log_probabilities="softmax" in parts, notes=notes)
    reads = "reads" in parts and (options.reparameterization != "auto" or bool(normalizations(ready)[0]))
    return _with_reads(found, formatted, options, kept) if reads else found


def _with_reads(
    found: Reparameterization, formatted: Formatted, options: ApplyOptions, kept: Artefacts
) -> Reparameterization:
    """The same with the reads that gain by ranges of their own, where norms are not rewritten."""
    ready, weights, notes, helping = formatted.ready, formatted.weights, dict(found.notes), []
    whole = {site for site, asked in formatted.sites.items() if asked.is_integer}
    reads = [read for read in scalable_reads(ready, weights, found.ranges) if read.site in whole]
    for read, rows in _outputs_of(ready, reads, formatted.batches, options.seed):
        asked = formatted.sites[read.site]
        compute = partial(searched, read, rows, ready.weights, weights, asked, options.ranges)
        searched_read = kept.cached(f"read: {read.site}", read.layers, compute, _read_codec(read))
        notes[read.site] = str(searched_read)
        if searched_read.helps:
            helping.append(searched_read)
    return replace(found, reads=tuple(helping), notes=notes)


def _read_codec(read: Read) -> Codec[ScaledRead]:
    """The range of a read, and the errors behind it without and with it."""

    def encode(one: ScaledRead) -> tuple[Arrays, str]:
        return {}, json.dumps({"found": one.found.to_dict(), "before": one.before, "after": one.after})

    def decode(_: Arrays, text: str) -> ScaledRead:
        note = json.loads(text)
        found = range_of(note["found"])
        assert found.integer, "searched for no others"
        return ScaledRead(read, found, note["before"], note["after"])

    return Codec(encode, decode)


def _codec(norm: Norm) -> Codec[tuple[Rewrite, float, float]]:
    """The rewrite of a norm, and the errors behind it without and with it."""

    def encode(measured: tuple[Rewrite, float, float]) -> tuple[Arrays, str]:
        change, before, after = measured
        note = json.dumps({"found": change.found.to_dict(), "before": before, "after": after})
        return {"ratio": change.ratio.numpy(), "shift": change.shift.numpy()}, note

    def decode(arrays: Arrays, text: str) -> tuple[Rewrite, float, float]:
        note, ratio, shift = json.loads(text), *(torch.from_numpy(arrays[name]) for name in ("ratio", "shift"))
        return Rewrite(norm, ratio, shift, SiteRange.from_dict(note["found"])), note["before"], note["after"]

    return Codec(encode, decode)


def _outputs_of(
    ready: Prepared, norms: Sequence[N], batches: Sequence[Batch], seed: int
) -> Iterator[tuple[N, Tensor]]:
    """Each norm or read with rows of its site, on the CPU, drawn over all batches; as many a pass as memory allows."""
    widths = {norm.site: ready.weights.inputs(norm.layers[0]) for norm in norms}
    at_once = max(1, ROW_BYTES // (4 * ROWS * max(widths.values(), default=1)))
    by_name = {site.name: site for site in ready.sites}
    for start in range(0, len(norms), at_once):
        some = norms[start : start + at_once]
        found: dict[str, list[Tensor]] = {norm.site: [] for norm in some}
        draws: torch.Generator = torch.Generator().manual_seed(seed)

        def keep(
            site: Site, x: Tensor, found: dict[str, list[Tensor]] = found, draws: torch.Generator = draws
        ) -> None:
            rows = x.reshape(-1, widths[site.name])
            drawn = torch.randperm(len(rows), generator=draws, device="cpu")[: -(-ROWS // len(batches))]
            found[site.name].append(rows[drawn].cpu())

        visit(ready.model, [by_name[norm.site] for norm in some], keep, batches, ready.padding)
        for norm in some:
            yield norm, torch.cat(found.pop(norm.site))


def _change(floats: Weights, norm: Norm, rows: Tensor, bits: int, learned: bool, seed: int) -> Rewrite:
    if not learned:
        return Rewrite.of(norm, mse_ranges(rows, bits)[0])
    weight = torch.cat([floats[name].detach().cpu() for name in norm.layers])
    return Rewrite.of(norm, clipped_ranges(rows, weight, bits, torch.Generator().manual_seed(seed)))


@torch.no_grad()
def _error(
    floats: Weights, rows: Tensor, weights: Mapping[str, WeightFormat], norm: Norm, found: Rewrite | SiteRange
) -> float:
    """Squared error of all layers behind a norm on held-back rows, its output and their weights quantized."""
    rows = rows[::HELD_BACK]
    if isinstance(found, Rewrite):
        ratio, shift = found.ratio.to(rows), found.shift.to(rows)
        quantized = found.found.fake_quantize((rows + shift) / ratio) * ratio - shift
    else:
        quantized, ratio = found.fake_quantize(rows), torch.ones_like(rows[0])
    total = 0.0
    for name in norm.layers:
        weight = floats[name].detach().cpu()
        rounded = quantize_weight(weight * ratio, [weights[name]], rounding="nearest").weights[weights[name]]
        total += float((quantized @ (rounded.dequantize() / ratio).T - rows @ weight.T).square().sum())
    return total
