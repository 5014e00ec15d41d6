"""Exact second order: every pair term d_i(b)^T H d_j(b') by Hessian-vector products.

One product r = H d_i(b) over all weights and sites gives its inner products with every other displacement ("Augmenting
Hessians with Inter-Layer Dependencies", arXiv 2306.04879; docs/methods/exact-pairs.md). Damage and pair terms are
those of the quadratic form itself, exact where damage is small: the matrix is positive semi-definite at the float
model, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from quantkit.progress import track
from quantkit.sensitivity.curvature import Landscape, gradients, hessian_product, inner
from quantkit.sensitivity.damage import mean_and_error
from quantkit.sensitivity.first_order import slopes
from quantkit.sensitivity.measure import Perturbation, Scores, Subject
from quantkit.sensitivity.registry import Cost, estimator


@estimator("hvp-pairs", Cost(lambda work: 3 + 4 * work.formats, keeps_graph=True))
def hvp_pairs(
    subject: Subject, perturbations: Sequence[Perturbation], progress: bool, generator: torch.Generator
) -> Scores:
    """K double backwards of the sample set. Nothing is drawn. Memory: one batch's graph, and all K displacements of
    weights and of that batch's site tensors. The standard error of single damages is over batches.
    """
    land = Landscape(subject, perturbations)
    with land.opened():
        parts = [_batch(land, i) for i in track(range(len(land)), "Hessian-vector products", enabled=progress)]
        linear = np.sum([slopes(land, i) for i in range(len(land))], axis=0) if subject.base else 0.0
    matrix = np.sum(parts, axis=0)
    matrix = (matrix + matrix.T) / 2
    damage = 0.5 * np.diag(matrix) + linear
    if not subject.base:
        damage = np.maximum(damage, 0)
    singles = torch.tensor(np.array([0.5 * np.diag(part) for part in parts]) / land.shares[:, None], device="cpu")
    errors = np.array([mean_and_error(column)[1] for column in singles.T])
    np.fill_diagonal(matrix, 2 * damage)
    return Scores(damage, errors, matrix, {"damage": land.damage.name})


def _batch(land: Landscape, i: int) -> np.ndarray:
    """Batch ``i``'s share of all d_k^T H d_l, (K, K)."""
    point = land.point(i)
    places = [p for p in land.members if p in point.variables]
    variables = [point.variables[p] for p in places]
    first = gradients(point.loss, variables)
    moved = {k: land.displacement(k, point) for p in places for k in land.members[p]}
    found = np.zeros((len(land.perturbations), len(land.perturbations)))
    for n, place in enumerate(places):
        for k in land.members[place]:
            product = hessian_product([first[n]], [variables[n]], [_known(moved[k])], by=variables)
            for other, row in zip(places, product, strict=True):
                for m in land.members[other]:
                    found[k, m] = inner(row, _known(moved[m]))
    return found


def _known(displacement: Tensor | None) -> Tensor:
    assert displacement is not None, "a place with a variable was reached"
    return displacement
