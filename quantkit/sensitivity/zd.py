"""ZD: the share of a block's weights more than one standard deviation above their mean; lower is more important.

LayerwiseQuant (arXiv 2406.17415; docs/methods/zd.md). A normal distribution gives 15.87 %; heavy tails widen the
deviation and leave fewer weights above it, and are hard to quantize. Data-free, a ranking, in no unit. On a small
convolutional network it hardly ranked at all (docs/results/allocation.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from quantkit.sensitivity.blocks import find_blocks, layers_of, ranking
from quantkit.sensitivity.measure import Perturbation, Scores, Subject
from quantkit.sensitivity.registry import Cost, estimator


@estimator("zd", Cost(lambda work: 0), ranking=True)
def zd(subject: Subject, perturbations: Sequence[Perturbation], progress: bool, generator: torch.Generator) -> Scores:
    """Rank layers by minus the ZD of all weights of their block, or of their own where they are in none."""
    layers = layers_of(perturbations)
    blocks = find_blocks(subject, layers)
    found = {b.name: _z_share(subject, b.layers) for b in blocks}
    own = {layer: -_z_share(subject, [layer]) for layer in layers}
    importance = own | {layer: -found[b.name] for b in blocks for layer in b.layers}
    return ranking(subject, perturbations, importance, {"blocks": found})


@estimator("zd-layer", Cost(lambda work: 0), ranking=True)
def zd_layer(
    subject: Subject, perturbations: Sequence[Perturbation], progress: bool, generator: torch.Generator
) -> Scores:
    """Rank layers by minus the ZD of their own weights."""
    importance = {layer: -_z_share(subject, [layer]) for layer in layers_of(perturbations)}
    return ranking(subject, perturbations, importance, {})


def _z_share(subject: Subject, layers: Iterable[str]) -> float:
    return z_share([subject.floats[layer] for layer in layers])


def z_share(weights: Sequence[Tensor]) -> float:
    """Share of all elements with (w - mean) / standard deviation above 1; 0 where all are equal."""
    together = torch.cat([w.detach().flatten().double() for w in weights])
    deviation = together.std(correction=0)
    if deviation == 0:
        return 0.0
    return float(((together - together.mean()) > deviation).double().mean())
