"""The explicit Hessian of the classifier's divergence by torch.func: a slow twin of every estimator of curvature."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from quantkit.numbers.uniform import QuantizedWeight
from quantkit.program.inputs import Batch
from quantkit.sensitivity.measure import Perturbation, Place
from quantkit.stages.request import Request

WEIGHTS = ("0", "2", "4")
SITES = ("input", "1", "3")  # what the layers of the same position read


class Explicit:
    """Gradient and Hessian of the mean divergence from the float classifier, by all weights and the tensors of all
    sites together, at weights ``base`` (default: the float ones). float64; ``slots`` locates each place's elements.
    """

    def __init__(self, request: Request, batches: Sequence[Batch], base: Sequence[Perturbation] = ()) -> None:
        model = request.ready.model
        self.x = torch.cat([args[0] for args, _ in batches]).double()
        self.weights = {name: model.get_submodule(name).weight.detach().double() for name in WEIGHTS}
        self.biases = {name: model.get_submodule(name).bias.detach().double() for name in WEIGHTS}
        count = len(self.x)
        shapes: dict[Place, tuple[int, ...]] = {(n, False): tuple(self.weights[n].shape) for n in WEIGHTS}
        shapes |= {(n, True): (count, self.weights[w].shape[1]) for n, w in zip(SITES, WEIGHTS, strict=True)}
        ends = np.cumsum([int(np.prod(s)) for s in shapes.values()])
        self.slots = {p: slice(e - int(np.prod(s)), e) for (p, s), e in zip(shapes.items(), ends, strict=True)}
        self.shapes = shapes
        log_p = self.logits(torch.zeros(int(ends[-1]), dtype=torch.float64)).log_softmax(-1)
        self.here = dict(self.weights)
        self.weights |= {p.owner: p.change.dequantize().double() for p in base}

        def divergence(flat: Tensor) -> Tensor:
            return (log_p.exp() * (log_p - self.logits(flat).log_softmax(-1))).sum(-1).mean()

        origin = torch.zeros(int(ends[-1]), dtype=torch.float64)
        self.gradient = torch.func.grad(divergence)(origin).numpy()
        self.hessian = torch.func.hessian(divergence)(origin).numpy()

    def part(self, flat: Tensor, place: Place) -> Tensor:
        return flat[self.slots[place]].reshape(self.shapes[place])

    def logits(self, flat: Tensor, record: dict[str, Tensor] | None = None) -> Tensor:
        """The classifier's output with the parts of ``flat`` added to weights and to sites' tensors."""
        x = self.x
        for site, name in zip(SITES, WEIGHTS, strict=True):
            if record is not None:
                record[site] = x
            x = x + self.part(flat, (site, True))
            x = x @ (self.weights[name] + self.part(flat, (name, False))).T + self.biases[name]
            x = x.relu() if name != WEIGHTS[-1] else x
        return x

    def displacements(self, chosen: Sequence[Perturbation]) -> np.ndarray:
        """Every perturbation as a vector of all variables, (K, elements)."""
        tensors: dict[str, Tensor] = {}
        size = len(self.gradient)
        self.logits(torch.zeros(size, dtype=torch.float64), tensors)
        found = np.zeros((len(chosen), size))
        for k, p in enumerate(chosen):
            if isinstance(p.change, QuantizedWeight):
                moved = p.change.dequantize().double() - self.weights[p.owner]
            else:
                moved = p.change.fake_quantize(tensors[p.owner].float()).double() - tensors[p.owner]
            found[k, self.slots[p.place]] = moved.flatten().numpy()
        return found

    def block(self, place: Place) -> np.ndarray:
        return self.hessian[self.slots[place], self.slots[place]]
