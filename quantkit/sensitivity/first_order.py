"""First order: |<g, d>|, what LLM-MQ spends bits by. For comparison only.

At the float model the damage has no gradient, so one has to be made up: that of the cross entropy to the model's own
most likely classes. At a trained optimum it is mostly noise (docs/methods/first-order.md). Around a base plan the
damage itself has a gradient, and <g, d> is the first-order increase, with its sign.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from quantkit.errors import InvalidRequest
from quantkit.progress import track
from quantkit.sensitivity.curvature import Landscape, Point, gradients, inner
from quantkit.sensitivity.measure import Perturbation, Scores, Subject
from quantkit.sensitivity.registry import Cost, estimator


@estimator("first-order", Cost(lambda work: 3, keeps_graph=True))
def first_order(
    subject: Subject, perturbations: Sequence[Perturbation], progress: bool, generator: torch.Generator
) -> Scores:
    """One forward and backward of the sample set. Nothing is drawn. Raises InvalidRequest for outputs that are no
    classes. The standard error is over batches.
    """
    land = Landscape(subject, perturbations)
    if not subject.base and not any(measure.softens for measure in land.damage.measures):
        raise InvalidRequest(
            "sensitivity='first-order' takes the gradient of a cross entropy, and this model's outputs are no class "
            "scores. Choose another estimator, 'gram' or 'kl' say."
        )
    value = _cross_entropy if not subject.base else _damage
    with land.opened():
        parts = [slopes(land, i, value) for i in track(range(len(land)), "gradients", enabled=progress)]
    slope = np.sum(parts, axis=0)
    spread = np.sqrt(np.sum((np.array(parts) - land.shares[:, None] * slope) ** 2, axis=0))
    damage = slope if subject.base else np.abs(slope)
    return Scores(damage, spread, notes={"damage": land.damage.name})


def _cross_entropy(land: Landscape, point: Point) -> Tensor:
    """Of the outputs that are classes; the others have no gradient at the float model, whatever is made up."""
    parts = zip(land.damage.measures, land.damage.counts, point.outputs, point.reference, strict=True)
    losses = [
        functional.cross_entropy(output, reference.argmax(-1), reduction="sum") / count
        for measure, count, output, reference in parts
        if measure.softens
    ]
    return torch.stack(losses).sum()


def _damage(land: Landscape, point: Point) -> Tensor:
    return point.loss


def slopes(land: Landscape, i: int, value: Callable[[Landscape, Point], Tensor] = _damage) -> np.ndarray:
    """<gradient of ``value``, displacement> of every perturbation (K), batch ``i``'s share of the mean."""
    point = land.point(i)
    places = [p for p in land.members if p in point.variables]
    found = np.zeros(len(land.perturbations))
    slope = gradients(value(land, point), [point.variables[p] for p in places], again=False)
    for place, g in zip(places, slope, strict=True):
        for k in land.members[place]:
            d = land.displacement(k, point)
            found[k] = 0.0 if d is None else inner(g, d)
    return found
