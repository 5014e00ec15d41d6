"""LIM: how much a block changes what flows through it, minus the cosine between its input and its output.

LayerwiseQuant (arXiv 2406.17415; docs/methods/lim.md): averaged over tokens and samples; higher is more important. A
ranking, in no unit. ``lim-layer`` takes the same of single layers, where input and output have one shape.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from quantkit.progress import track
from quantkit.sensitivity.blocks import layers_of, ranking, require_blocks, watched
from quantkit.sensitivity.measure import Perturbation, Scores, Subject
from quantkit.sensitivity.outputs import rows_of
from quantkit.sensitivity.registry import Cost, estimator

HIGHEST = 1.0  # a layer outside all blocks ranks first: first and last layers matter most


@estimator("lim", Cost(lambda work: 1), ranking=True)
def lim(subject: Subject, perturbations: Sequence[Perturbation], progress: bool, generator: torch.Generator) -> Scores:
    """Rank layers by their block's LIM: one forward of the sample set. Nothing is drawn. Raises InvalidRequest for a
    model without blocks.
    """
    layers = layers_of(perturbations)
    blocks = require_blocks(subject, layers, "lim")
    found = layer_input_modification(subject, [b.name for b in blocks], progress)
    importance = dict.fromkeys(layers, HIGHEST) | {layer: found[b.name] for b in blocks for layer in b.layers}
    return ranking(subject, perturbations, importance, {"blocks": found})


@estimator("lim-layer", Cost(lambda work: 1), ranking=True)
def lim_layer(
    subject: Subject, perturbations: Sequence[Perturbation], progress: bool, generator: torch.Generator
) -> Scores:
    """Rank layers by their own LIM; one that changes the shape gets its block's."""
    layers = layers_of(perturbations)
    blocks = require_blocks(subject, layers, "lim-layer")
    found = layer_input_modification(subject, [*layers, *(b.name for b in blocks)], progress)
    importance = dict.fromkeys(layers, HIGHEST) | {layer: found[b.name] for b in blocks for layer in b.layers}
    own = {layer: found[layer] for layer in layers if layer in found}
    return ranking(subject, perturbations, importance | own, {"layers": own})


def layer_input_modification(subject: Subject, names: Collection[str], progress: bool = True) -> dict[str, float]:
    """LIM, -1 to 1, of the modules that return the shape they are given; others have none."""
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)

    def see(name: str, entering: Tensor, leaving: Tensor) -> None:
        if entering.shape == leaving.shape:
            cosines = torch.cosine_similarity(rows_of(entering), rows_of(leaving), dim=-1)
            sums[name] -= float(cosines.double().sum())
            counts[name] += len(cosines)

    with watched(subject.model, names, see):
        for _ in track(subject.outputs(), "layer input modification", len(subject.batches), progress):
            pass
    return {name: sums[name] / counts[name] for name in names if counts[name]}
