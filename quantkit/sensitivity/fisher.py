"""Fisher information along each perturbation: 1/2 E <g_n, dy_n>^2, one backward for all formats.

g_n is the gradient of the log-likelihood of a label by a layer's whole output for sample n, dy_n the shift that the
perturbed weight makes in it: their inner product is taken before squaring (docs/methods/fisher.md; squares of single
elements ignore how elements work together and rank far worse). Labels are drawn from the model's own distribution,
which gives the true Fisher information, the Hessian of the divergence; true labels would give the empirical one. A
sample's rows get independent labels, so cross terms vanish on average and the sum over its rows may be squared as a
whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from quantkit.program.inputs import batch_size
from quantkit.program.intercept import OpKey
from quantkit.progress import track
from quantkit.sensitivity.curvature import Landscape, Point
from quantkit.sensitivity.damage import mean_and_error
from quantkit.sensitivity.first_order import slopes
from quantkit.sensitivity.measure import Perturbation, Place, Scores, Subject
from quantkit.sensitivity.registry import Cost, estimator

DRAWS = 4


@estimator("fisher", Cost(lambda work: 1 + 2 * DRAWS + work.formats / work.places, keeps_graph=True))
def fisher(
    subject: Subject, perturbations: Sequence[Perturbation], progress: bool, generator: torch.Generator
) -> Scores:
    """One forward and ``DRAWS`` backwards of the sample set, and every layer once per format. Memory: one batch's
    graph and layer inputs. The standard error is over samples.
    """
    land = Landscape(subject, perturbations)
    squares, linear = [], np.zeros(len(perturbations))
    with land.opened():
        for i in track(range(len(land)), "Fisher information", enabled=progress):
            squares.append(_squares(land, i, generator))
            if subject.base:
                linear += slopes(land, i)
    samples = torch.cat(squares, dim=1)
    scale = 0.5 * samples.shape[1] / land.rows
    found = [mean_and_error(scale * row) for row in samples]
    means, errors = np.array(found).reshape(-1, 2).T.copy()
    return Scores(means + linear, errors, notes={"damage": land.damage.name, "draws": DRAWS})


class _Calls:
    """The calls that read perturbed weights: their inputs, and zeros added to what they make, to differentiate by."""

    def __init__(self, land: Landscape) -> None:
        floats = land.subject.floats
        self.weights = {id(land.weight(name)): name for name, _ in land.layers}
        self.kinds = {weight.kind for weight in floats.layers.values() if hasattr(functional, weight.kind)}
        self.made: dict[OpKey, tuple[int, tuple[Any, ...], dict[str, Any]]] = {}
        self.added: dict[OpKey, Tensor] = {}

    def before(self, key: OpKey, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if key.op not in self.kinds:
            return
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        if id(weight) in self.weights:
            source = args[0] if args else kwargs["input"]
            rest = {k: v for k, v in kwargs.items() if k not in ("input", "weight", "bias")}
            self.made[key] = id(weight), (source.detach().clone(), *args[2:]), rest

    def at_output(self, key: OpKey, made: Tensor) -> Tensor:
        if key not in self.made:
            return made
        return made + self.added.setdefault(key, torch.zeros_like(made).requires_grad_())

    def shift(self, key: OpKey, displacement: Tensor) -> Tensor:
        """What the call would make of a weight that is ``displacement``, without its bias."""
        _, (source, *rest), kwargs = self.made[key]
        if key.op != "embedding":
            rest = [None, *rest[1:]]
        return getattr(functional, key.op)(source, displacement, *rest, **kwargs)


def _squares(land: Landscape, i: int, generator: torch.Generator) -> Tensor:
    """Mean over draws of the squared inner product, (K, samples of batch ``i``)."""
    calls = _Calls(land)
    point = land.point(i, calls.at_output, calls.before)
    count = max(1, batch_size(land.subject.batches[i]))
    variables: dict[OpKey | Place, Tensor] = dict(calls.added.items())
    variables |= {place: point.variables[place] for place in land.sites if place in point.variables}
    total = torch.zeros(len(land.perturbations), count, dtype=torch.float64, device="cpu")
    if not variables:
        return total
    drawn = _slopes(land, point, variables, generator)
    with torch.no_grad():
        for k in range(len(land.perturbations)):
            shifts = _shifts(land, calls, point, k)
            products = torch.zeros(DRAWS, count, dtype=torch.float64, device="cpu")
            for key, shift in shifts.items():
                products += per_sample(drawn[key], shift, count)
            total[k] = products.square().mean(0)
    return total


def _slopes(
    land: Landscape, point: Point, variables: Mapping[OpKey | Place, Tensor], generator: torch.Generator
) -> dict[OpKey | Place, Tensor]:
    """Gradients of the log-likelihood of labels drawn anew, summed over the rows, a first dimension for the draws."""
    found = []
    for _ in range(DRAWS):
        drawn = land.damage.cotangent(tuple(output.detach() for output in point.outputs), generator)
        live = [(output, c) for output, c in zip(point.outputs, drawn, strict=True) if output.requires_grad]
        found.append(
            torch.autograd.grad(
                [output for output, _ in live],
                list(variables.values()),
                [c for _, c in live],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        )
    return {key: torch.stack(slopes) for key, slopes in zip(variables, zip(*found, strict=True), strict=True)}


def _shifts(land: Landscape, calls: _Calls, point: Point, k: int) -> dict[OpKey | Place, Tensor]:
    """What perturbation ``k`` adds to the outputs of the calls that read its weight, or to its site's tensor."""
    one = land.perturbations[k]
    moved = land.displacement(k, point)
    if moved is None:
        return {}
    if one.place[1]:
        return {one.place: moved}
    weight = id(land.weight(one.owner))
    return {key: calls.shift(key, moved) for key, (used, _, _) in calls.made.items() if used == weight}


def per_sample(slopes: Tensor, shift: Tensor, count: int) -> Tensor:
    """Inner products (draws, count) of each sample's elements, for ``slopes`` (draws, ...) and ``shift`` (...) with
    samples along the first dimension of the latter. Where that cannot be, one of the whole batch, and zeros: samples
    have independent labels, so their cross terms vanish on average.
    """
    if shift.dim() and len(shift) == count:
        rows = shift.reshape(count, -1)
        return torch.einsum("rnd,nd->rn", slopes.reshape(len(slopes), count, -1), rows).double().cpu()
    whole = torch.zeros(len(slopes), count, dtype=torch.float64, device="cpu")
    whole[:, 0] = slopes.flatten(1).double().cpu() @ shift.flatten().double().cpu()
    return whole
