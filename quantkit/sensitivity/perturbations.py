"""The perturbations a profile measures: every candidate format of every layer, and of every site, quantized as it will
be.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from quantkit.formats import ActivationFormat, Scheme, WeightFormat
from quantkit.numbers.kinds import AnyWeight, token_range
from quantkit.program.inputs import Batch
from quantkit.progress import track
from quantkit.ranges.activations import RANGES, Extremes, Histogram
from quantkit.ranges.statistics import in_memory_bound, layer_hessians, site_histograms
from quantkit.reconstruction.snapshot import weights_codec
from quantkit.rounding import Moments, rounding_of
from quantkit.rounding.request import RoundingOptions
from quantkit.rounding.weights import quantize_weight, rounding_note
from quantkit.sensitivity.measure import Perturbation
from quantkit.simulation.model import as_float
from quantkit.store import Arrays, Artefacts, Codec
from quantkit.transforms.prepare import Prepared


def weight_perturbations(
    ready: Prepared,
    candidates: Mapping[str, Sequence[Scheme]],
    batches: Sequence[Batch],
    rounding: RoundingOptions,
    progress: bool,
    artefacts: Artefacts | None = None,
) -> tuple[list[Perturbation], dict[str, str]]:
    """Codes of every candidate format of every layer, rounded on the float network's inputs with one Hessian
    factorization for all formats of a layer, and how each layer was rounded. Layers found in ``artefacts`` are not
    rounded again.
    """
    kept, known = artefacts or Artefacts(), rounding.known
    observed = as_float(ready.model, ready.weights)
    formats = {n: list(dict.fromkeys(s.weight for s in c if s.weight is not None)) for n, c in candidates.items()}
    pieces = {name: (f"rounding: layer {name}", list(map(str, own))) for name, own in formats.items()}
    codecs = {name: weights_codec({str(f): f for f in own}) for name, own in formats.items()}
    done = {n: codecs[n].decode(*found) for n in formats if (found := kept.find(*pieces[n])) is not None}

    # One pass over the batches collects the Hessians of as many layers as fit into memory.
    most = rounding.hessian_bytes
    for run in in_memory_bound(ready.weights, [name for name in formats if name not in done], most):
        seen: dict[str, Moments] = {}
        coded = [n for n in run if n not in known and not all(format.is_half for format in formats[n])]
        if rounding_of(rounding.name).hessian and coded:
            shown = track(batches, "layer inputs", enabled=progress)
            seen = layer_hessians(observed, ready.program, coded, shown, most, ready.padding)
        for name in track(run, "rounding", enabled=progress):
            compute = partial(
                _rounded, ready, name, formats[name], known.get(name) or seen.pop(name, None), rounding.name
            )
            done[name] = kept.cached(*pieces[name], compute, codecs[name])
    rounded_as = [Perturbation(n, str(f), done[n][0][str(f)]) for n, fs in formats.items() for f in fs]
    return rounded_as, {name: done[name][1] for name in formats}


def _rounded(
    ready: Prepared, layer: str, formats: Sequence[WeightFormat], moments: Moments | None, rounding: str
) -> tuple[dict[str, AnyWeight], str]:
    """A layer's codes in every format, and how they were rounded."""
    weight = ready.weights.layers[layer]
    looks = weight.inputs_seen or moments is not None
    how = rounding if looks or not rounding_of(rounding).hessian else "nearest"
    rounded = quantize_weight(ready.weights[layer], formats, moments, weight.groups, how)
    return {str(f): codes for f, codes in rounded.weights.items()}, rounding_note(layer, rounded, how)


def site_perturbations(
    ready: Prepared,
    formats: Iterable[ActivationFormat],
    batches: Sequence[Batch],
    ranges: str,
    progress: bool,
    artefacts: Artefacts | None = None,
) -> list[Perturbation]:
    """The range of every site in every format, found on the float network's values: two passes over ``batches`` for
    all sites together, unless ``artefacts`` has what they found. Scales of tokens are found as they come.
    """
    ordered = sorted(formats, key=str)
    if ordered and ordered[0].dynamic:
        return [Perturbation(site.name, str(f), token_range(f)) for site in ready.sites for f in ordered]
    histograms = _histograms(ready, batches, progress, artefacts or Artefacts()) if ordered else {}
    return [
        Perturbation(name, str(format), RANGES[ranges](histogram, format.bits))
        for name, histogram in histograms.items()
        for format in ordered
    ]


def _histograms(
    ready: Prepared, batches: Sequence[Batch], progress: bool, artefacts: Artefacts
) -> dict[str, Histogram]:
    names = [site.name for site in ready.sites]

    def encode(histograms: dict[str, Histogram]) -> tuple[Arrays, str]:
        extremes = np.array([(h.extremes.low, h.extremes.high) for h in histograms.values()])
        return {"extremes": extremes, "counts": np.stack([h.counts.numpy() for h in histograms.values()])}, ""

    def decode(arrays: Arrays, note: str) -> dict[str, Histogram]:
        pairs = zip(names, arrays["extremes"].tolist(), arrays["counts"], strict=True)
        return {name: Histogram(Extremes(*ends), torch.from_numpy(counts)) for name, ends, counts in pairs}

    compute = partial(site_histograms, ready.model, ready.sites, batches, progress, ready.padding)
    return artefacts.cached("ranges: all sites", names, compute, Codec(encode, decode)) if names else {}
