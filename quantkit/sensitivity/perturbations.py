"""The perturbations a profile measures: every candidate format of every layer, and of every site, quantized as it will
be.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from quantkit.formats import ActivationFormat, Scheme
from quantkit.graph.batches import Batch
from quantkit.graph.layers import groups_of, weight_of
from quantkit.progress import track
from quantkit.quantizers.activation_ranges import RANGES
from quantkit.quantizers.simulate import SimulatedModel
from quantkit.quantizers.statistics import in_memory_bound, layer_hessians, site_histograms
from quantkit.quantizers.weights import quantize_weight, rounding_note
from quantkit.sensitivity.measure import Perturbation
from quantkit.transforms.prepare import Prepared


def weight_perturbations(
    ready: Prepared,
    candidates: Mapping[str, Sequence[Scheme]],
    batches: Sequence[Batch],
    rounding: str,
    progress: bool,
) -> tuple[list[Perturbation], dict[str, str]]:
    """Codes of every candidate format of every layer, rounded on the float network's inputs with one Hessian
    factorization for all formats of a layer, and how each layer was rounded.
    """
    observed = SimulatedModel(ready.model, (), {}, {})
    found: list[Perturbation] = []
    how: dict[str, str] = {}
    for run in in_memory_bound(ready.model, list(candidates)):
        hessians = {}
        if rounding != "nearest":
            hessians = layer_hessians(observed, ready.trace, run, track(batches, "layer inputs", enabled=progress))
        for name in track(run, "rounding", enabled=progress):
            formats = list(dict.fromkeys(s.weight for s in candidates[name] if s.weight is not None))
            weight = weight_of(ready.model, name)
            rounded = quantize_weight(weight, formats, hessians.get(name), groups_of(ready.model, name))
            how[name] = rounding_note(name, rounded, rounding)
            found += [Perturbation(name, str(format), rounded.weights[format]) for format in formats]
    return found, how


def site_perturbations(
    ready: Prepared, formats: Iterable[ActivationFormat], batches: Sequence[Batch], ranges: str, progress: bool
) -> list[Perturbation]:
    """The range of every site in every format, found on the float network's values."""
    ordered = sorted(formats, key=str)
    histograms = site_histograms(ready.model, ready.sites, batches, progress)
    return [
        Perturbation(name, str(format), RANGES[ranges](histogram, format.bits))
        for name, histogram in histograms.items()
        for format in ordered
    ]
