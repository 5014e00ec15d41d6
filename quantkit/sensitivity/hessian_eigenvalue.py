"""HAWQ: half the largest eigenvalue of a layer's Hessian times the squared error of its weight.

Power iteration per layer on its own block H_ii (Dong et al., arXiv 1905.03696; docs/methods/hessian-eigenvalue.md).
Half of Omega_i = lambda_i ||Q(W_i) - W_i||^2 is the most damage an error of that length can do to second order. Notes
carry lambda_i, the bit order (lambda_i / n_i, descending) and the order Omega in which blocks are to be reconstructed.
Sites have a block per sample, so each sample has its own eigenvalue, found for all samples of a batch at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from quantkit.program.inputs import batch_size
from quantkit.progress import track, warn
from quantkit.sensitivity.curvature import Landscape, Point, gradients, hessian_product, inner
from quantkit.sensitivity.first_order import slopes
from quantkit.sensitivity.hessian_trace import squared_errors
from quantkit.sensitivity.measure import Perturbation, Place, Scores, Subject
from quantkit.sensitivity.registry import Cost, estimator

MOST_STEPS = 100
TYPICAL_STEPS = 20
TOLERANCE = 1e-4  # relative change at which iterating stops; PyHessian's 1e-3 ends several times that away
STILL = 3  # steps in a row with so little change: a slow start must not pass for the end


@estimator("hessian-eigenvalue", Cost(lambda work: TYPICAL_STEPS * (3 + 4 * work.places), keeps_graph=True))
def hessian_eigenvalue(
    subject: Subject, perturbations: Sequence[Perturbation], progress: bool, generator: torch.Generator
) -> Scores:
    """Power iteration of all layers side by side: per step a forward, a backward and a double backward per layer of
    the sample set; for sites a double backward per site, step and batch. Standard errors are 0: nothing but the start
    is random. Negative eigenvalues count as 0, with a warning.
    """
    land = Landscape(subject, perturbations)
    with land.opened():
        values = top_eigenvalues(land, generator, progress)
        errors, _ = squared_errors(land)
        damage = 0.5 * errors * [max(values.get(p.place, 0.0), 0.0) for p in perturbations]
        if land.sites:
            for i in track(range(len(land)), "eigenvalues of sites", enabled=progress):
                damage += _site_damage(land, i, generator)
        if subject.base:
            damage += np.sum([slopes(land, i) for i in range(len(land))], axis=0)
    negative = [name for (name, _), value in values.items() if value < 0]
    if negative:
        warn(f"negative Hessian eigenvalues, counted as 0: {', '.join(negative)}")
    notes = {"damage": land.damage.name, "negative_eigenvalues": negative} | _orders(land, values, damage)
    return Scores(damage, np.zeros(len(damage)), notes=notes)


def _orders(land: Landscape, values: dict[Place, float], damage: np.ndarray) -> dict[str, object]:
    """Eigenvalues by layer, and the two orders HAWQ takes from them."""
    mean = {name: values[name, False] / land.elements(name) for name, _ in land.layers}
    omega = {place[0]: max(damage[k] for k in land.members[place]) for place in land.layers}
    return {
        "eigenvalues": {name: value for (name, _), value in values.items()},
        "bit_order": sorted(mean, key=mean.__getitem__, reverse=True),
        "reconstruction_order": sorted(omega, key=omega.__getitem__, reverse=True),
    }


def top_eigenvalues(land: Landscape, generator: torch.Generator, progress: bool = True) -> dict[Place, float]:
    """The eigenvalue of largest magnitude of every layer's block. The first batch alone finds where to start."""
    start = {
        p: torch.randn(land.weight(p[0]).shape, generator=generator, dtype=torch.float32, device="cpu")
        for p in land.layers
    }
    vectors = {p: (v / v.norm()).to(land.weight(p[0])) for p, v in start.items()}
    if len(land) > 1:
        _iterate(land, range(1), vectors, progress)
    return _iterate(land, range(len(land)), vectors, progress)


def _iterate(
    land: Landscape, batches: Iterable[int], vectors: dict[Place, Tensor], progress: bool
) -> dict[Place, float]:
    """Power iteration from ``vectors``, which it moves, on the Hessian of some batches."""
    values: dict[Place, float] = dict.fromkeys(vectors, 0.0)
    still = dict.fromkeys(vectors, 0)
    for _ in track(range(MOST_STEPS), "eigenvalues of layers", enabled=progress):
        moving = [p for p in vectors if still[p] < STILL]
        if not moving:
            break
        products = {p: torch.zeros_like(vectors[p]) for p in moving}
        for i in batches:
            _add_products(land, i, vectors, products)
        for p in moving:
            value, length = inner(vectors[p], products[p]), float(products[p].norm())
            still[p] = still[p] + 1 if abs(value - values[p]) <= TOLERANCE * abs(values[p]) else 0
            values[p] = value
            if length == 0:  # nothing depends on this layer
                still[p] = STILL
            else:
                vectors[p] = products[p] / length
    return values


def _add_products(land: Landscape, i: int, vectors: dict[Place, Tensor], products: dict[Place, Tensor]) -> None:
    """Add batch ``i``'s share of H_jj v_j for every layer of ``products``: one graph, a double backward per layer."""
    point = land.point(i)
    variables = [point.variables[p] for p in products]
    first = gradients(point.loss, variables)
    for p, gradient, variable in zip(products, first, variables, strict=True):
        products[p] += hessian_product([gradient], [variable], [vectors[p]])[0].detach()


def _site_damage(land: Landscape, i: int, generator: torch.Generator) -> np.ndarray:
    """Half the sum over the samples of batch ``i`` of eigenvalue times squared error, (K)."""
    point = land.point(i)
    found = np.zeros(len(land.perturbations))
    count = max(1, batch_size(land.subject.batches[i]))
    for place in land.sites:
        if place not in point.variables:
            continue
        values = _sample_eigenvalues(point, place, count, generator).clamp(min=0)
        for k in land.members[place]:
            moved = land.displacement(k, point)
            if moved is not None:
                found[k] = 0.5 * inner(values, _rows(moved, count).double().square().sum(1))
    return found


def _rows(x: Tensor, count: int) -> Tensor:
    """One row per sample, or a single one where samples are not along the first dimension."""
    return x.reshape(count if x.dim() and len(x) == count else 1, -1)


def _sample_eigenvalues(point: Point, place: Place, count: int, generator: torch.Generator) -> Tensor:
    """The eigenvalue of largest magnitude of every sample's block, float64: the batch's Hessian has no others."""
    variable = point.variables[place]
    (first,) = gradients(point.loss, [variable])
    vector = _rows(
        torch.randn(variable.shape, generator=generator, dtype=torch.float32, device="cpu").to(variable), count
    )
    values = torch.zeros(len(vector), dtype=torch.float64, device=vector.device)
    still = 0
    for _ in range(MOST_STEPS):
        vector = vector / vector.norm(dim=1, keepdim=True).clamp(min=1e-30)
        (product,) = hessian_product([first], [variable], [vector.reshape(variable.shape)])
        product = _rows(product.detach(), count)
        new = (vector.double() * product.double()).sum(1)
        still = still + 1 if ((new - values).abs() <= TOLERANCE * new.abs().max()).all() else 0
        values, vector = new, product
        if still == STILL:
            break
    return values
