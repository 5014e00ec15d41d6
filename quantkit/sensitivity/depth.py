"""How a network uses its depth: what each sublayer adds to the residual stream, and what skipping it does.

Csordas et al., "Do Language Models Use Their Depth Efficiently?" (docs/methods/depth.md): the relative contribution
||sublayer|| / ||stream||, its cosine with the stream, and the damage when its contribution is left out. Layers rank by
the last. A ranking: leaving a sublayer out is in the damage's unit, but is no format's damage.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from quantkit.progress import track
from quantkit.sensitivity.blocks import Block, layers_of, ranking, require_blocks, watched
from quantkit.sensitivity.damage import Reference
from quantkit.sensitivity.measure import Perturbation, Scores, Subject
from quantkit.sensitivity.outputs import rows_of
from quantkit.sensitivity.registry import Cost, estimator


@estimator("depth", Cost(lambda work: work.places + 2), ranking=True)
def depth(
    subject: Subject, perturbations: Sequence[Perturbation], progress: bool, generator: torch.Generator
) -> Scores:
    """Rank layers by the damage of skipping their sublayer, or their block where they are in no sublayer: a forward of
    the sample set per block and sublayer. Layers outside all blocks rank first. Nothing is drawn. Raises
    InvalidRequest for a model without blocks.
    """
    layers = layers_of(perturbations)
    blocks = require_blocks(subject, layers, "depth")
    skipped = skip_damage(subject, blocks, progress)
    importance = dict.fromkeys(layers, max(skipped.values()))
    for block in blocks:
        importance |= dict.fromkeys(block.layers, skipped[block.name])
        for name, inside in block.sublayers.items():
            importance |= dict.fromkeys(inside, skipped[name])
    size, cosine = contributions(subject, blocks)
    return ranking(
        subject, perturbations, importance, {"skipped": skipped, "contribution": size, "cosine_with_stream": cosine}
    )


def skip_damage(subject: Subject, blocks: Sequence[Block], progress: bool = True) -> dict[str, float]:
    """Mean damage when a block returns what it was given, and when a sublayer returns zeros."""
    reference = Reference.of(subject)
    names = [name for block in blocks for name in (block.name, *block.sublayers)]
    whole = {block.name for block in blocks}

    def skip(name: str, entering: Tensor, leaving: Tensor) -> Tensor:
        return entering if name in whole else torch.zeros_like(leaving)

    found = {}
    for name in track(names, "skipping sublayers", enabled=progress):
        with watched(subject.model, [name], skip):
            found[name] = reference.damage_of(subject.outputs()).mean
    return found


def contributions(subject: Subject, blocks: Sequence[Block]) -> tuple[dict[str, float], dict[str, float]]:
    """Mean over tokens of ||added|| / ||stream|| and of cos(added, stream), for every block and sublayer; the stream
    is what enters the block.
    """
    added: dict[str, Tensor] = {}
    sums: Mapping[str, list[np.ndarray]] = defaultdict(list)
    block_of = {name: block for block in blocks for name in block.sublayers}

    def see(name: str, entering: Tensor, leaving: Tensor) -> None:
        if name in block_of:
            added[name] = rows_of(leaving).clone()  # the block may add the stream to it in place
            return
        stream = rows_of(entering)
        block = next(b for b in blocks if b.name == name)
        parts = {name: rows_of(leaving) - stream} | {s: added[s] for s in block.sublayers if s in added}
        for part, update in parts.items():
            size = update.norm(dim=-1) / stream.norm(dim=-1).clamp(min=1e-30)
            cosine = torch.cosine_similarity(update, stream, dim=-1)
            sums[part].append(torch.stack([size, cosine]).double().cpu().numpy())

    with watched(subject.model, [*block_of, *(b.name for b in blocks)], see):
        for _ in subject.outputs():
            pass
    means = {name: np.concatenate(parts, axis=1).mean(1) for name, parts in sums.items()}
    return {n: float(m[0]) for n, m in means.items()}, {n: float(m[1]) for n, m in means.items()}
