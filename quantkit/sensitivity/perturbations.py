"""The perturbations a profile measures: every candidate format of every layer, and of every site, quantized as it will
be.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from quantkit.formats import ActivationFormat, Scheme, WeightFormat
from quantkit.numbers.per_token import TokenRange
from quantkit.numbers.uniform import QuantizedWeight
from quantkit.program.inputs import Batch
from quantkit.progress import track
from quantkit.ranges.activations import RANGES, Extremes, Histogram
from quantkit.ranges.statistics import in_memory_bound, layer_hessians, site_histograms
from quantkit.reconstruction.snapshot import arrays_of, weight_of_arrays
from quantkit.rounding.weights import WITHOUT_INPUTS, quantize_weight, rounding_note
from quantkit.sensitivity.measure import Perturbation
from quantkit.simulation.model import as_float
from quantkit.store import Artefacts
from quantkit.transforms.prepare import Prepared


def weight_perturbations(
    ready: Prepared,
    candidates: Mapping[str, Sequence[Scheme]],
    batches: Sequence[Batch],
    rounding: str,
    progress: bool,
    artefacts: Artefacts | None = None,
) -> tuple[list[Perturbation], dict[str, str]]:
    """Codes of every candidate format of every layer, rounded on the float network's inputs with one Hessian
    factorization for all formats of a layer, and how each layer was rounded. Layers found in ``artefacts`` are not
    rounded again.
    """
    kept = artefacts or Artefacts()
    observed = as_float(ready.model, ready.weights)
    formats = {n: list(dict.fromkeys(s.weight for s in c if s.weight is not None)) for n, c in candidates.items()}
    done = {name: found for name in formats if (found := _find(kept, name, formats[name])) is not None}
    for run in in_memory_bound(ready.weights, [name for name in formats if name not in done]):
        hessians = {}
        if rounding not in WITHOUT_INPUTS:
            hessians = layer_hessians(observed, ready.program, run, track(batches, "layer inputs", enabled=progress))
        for name in track(run, "rounding", enabled=progress):
            weight, hessian = ready.weights.layers[name], hessians.pop(name, None)
            how = rounding if weight.reads_rows or rounding in WITHOUT_INPUTS else "nearest"
            rounded = quantize_weight(ready.weights[name], formats[name], hessian, weight.groups, how)
            done[name] = rounded.weights, rounding_note(name, rounded, how)
            _keep(kept, name, *done[name])
    rounded_as = [Perturbation(n, str(f), done[n][0][f]) for n, fs in formats.items() for f in fs]
    return rounded_as, {name: done[name][1] for name in formats}


Codes = dict[WeightFormat, QuantizedWeight]


def _keep(artefacts: Artefacts, layer: str, weights: Codes, note: str) -> None:
    arrays: dict[str, np.ndarray] = {}
    for format, weight in weights.items():
        arrays |= arrays_of(weight, str(format))
    artefacts.keep(f"rounding: layer {layer}", list(map(str, weights)), arrays, note)


def _find(artefacts: Artefacts, layer: str, formats: Sequence[WeightFormat]) -> tuple[Codes, str] | None:
    kept = artefacts.find(f"rounding: layer {layer}", list(map(str, formats)))
    if kept is None:
        return None
    return {f: weight_of_arrays(kept[0], str(f), f) for f in formats}, kept[1]


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
        return [Perturbation(site.name, str(f), TokenRange(f.bits)) for site in ready.sites for f in ordered]
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
    kept = artefacts.find("ranges: all sites", names)
    if kept is not None:
        pairs = zip(kept[0]["extremes"].tolist(), kept[0]["counts"], strict=True)
        found = [Histogram(Extremes(*extremes), torch.from_numpy(counts)) for extremes, counts in pairs]
        return dict(zip(names, found, strict=True))
    histograms = site_histograms(ready.model, ready.sites, batches, progress)
    if histograms:
        extremes = np.array([(h.extremes.low, h.extremes.high) for h in histograms.values()])
        counts = np.stack([h.counts.numpy() for h in histograms.values()])
        artefacts.keep("ranges: all sites", names, {"extremes": extremes, "counts": counts})
    return histograms
