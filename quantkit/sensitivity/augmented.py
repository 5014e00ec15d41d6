"""The augmented score of a layer: its own damage, and what it adds to the damage of all others.

s_i = damage_i(b_low) + sum over j != i of max(0, I_ij), with every layer at its narrowest format b_low ("Augmenting
Hessians with Inter-Layer Dependencies", arXiv 2306.04879; docs/methods/accuracy-bisection.md). Bisection moves layers
to fewer bits in ascending order of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quantkit.sensitivity.measure import Perturbation, Scores


def augmented_scores(perturbations: Sequence[Perturbation], scores: Scores) -> dict[str, float]:
    """The score of every layer, loss units; without pair terms in ``scores`` its own damage alone."""
    lowest: dict[str, tuple[int, int]] = {}
    for k, p in enumerate(perturbations):
        if not p.at_site:
            lowest[p.owner] = min(lowest.get(p.owner, (1 << 30, k)), (p.change.bits, k))
    chosen = [k for _, k in lowest.values()]
    found = scores.damage[chosen].copy()
    if scores.gram is not None:
        pairs = scores.gram[np.ix_(chosen, chosen)]
        found += np.maximum(pairs - np.diag(np.diag(pairs)), 0).sum(1)
    return dict(zip(lowest, map(float, found), strict=True))
