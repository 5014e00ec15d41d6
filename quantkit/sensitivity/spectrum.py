"""The density of the Hessian's eigenvalues by stochastic Lanczos quadrature.

From a random start of unit length, k steps of Lanczos give a small tridiagonal matrix T; its eigenvalues, weighed by
the squares of the first elements of its eigenvectors, are a quadrature of the spectrum (Ghorbani et al., arXiv
1901.10159; Yao et al., arXiv 1912.07145; docs/methods/spectrum.md). Every new vector is made orthogonal to all before
it, twice: without, rounding lets found eigenvalues return as ghosts. What to see: a bulk at zero, and a few outliers,
about as many as there are classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quantkit.progress import track
from quantkit.sensitivity.curvature import Landscape, gradients, hessian_product
from quantkit.sensitivity.measure import Subject, random_signs

STEPS = 100
EXHAUSTED = 1e-7  # of the largest value so far: a residual this short is rounding, the start's subspace is complete


@dataclass(frozen=True)
class Spectrum:
    """Ritz values in ascending order and their weights, both (M,), weights summing to 1, of a Hessian of
    ``dimension`` rows.
    """

    values: np.ndarray
    weights: np.ndarray
    dimension: int

    @property
    def trace(self) -> float:
        """The quadrature's estimate of the Hessian's trace."""
        return self.dimension * float(self.weights @ self.values)

    def density(self, points: np.ndarray, width: float | None = None) -> np.ndarray:
        """Density of eigenvalues at ``points``, integrating to 1: each value a Gaussian of standard deviation
        ``width``, by default sqrt(1e-5 max(1, range of values)) as PyHessian has it.
        """
        if width is None:
            width = float(np.sqrt(1e-5 * max(1.0, np.ptp(self.values))))
        distance = (np.asarray(points)[:, None] - self.values) / width
        return np.exp(-0.5 * distance**2) @ self.weights / (width * np.sqrt(2 * np.pi))


def spectral_density(
    subject: Subject,
    layers: Sequence[str],
    generator: torch.Generator,
    steps: int = STEPS,
    starts: int = 1,
    progress: bool = True,
) -> Spectrum:
    """The spectrum of the damage's Hessian by the weights of ``layers`` together, from ``starts`` random starts.

    ``steps`` x ``starts`` products, each a forward, a backward and a double backward of the sample set. Memory:
    ``steps`` float64 vectors as long as all the weights.
    """
    land = Landscape(subject, layers=layers)
    count = sum(land.elements(name) for name in layers)
    rounds = []
    with land.opened():
        for _ in range(starts):
            start = random_signs(torch.empty(count, dtype=torch.float64, device="cpu"), generator)
            rounds.append(lanczos(lambda v: weight_product(land, v), start, steps, progress))
    values = np.concatenate([values for values, _ in rounds])
    weights = np.concatenate([weights for _, weights in rounds]) / starts
    order = np.argsort(values)
    return Spectrum(values[order], weights[order], count)


def weight_product(land: Landscape, vector: Tensor) -> Tensor:
    """Hessian of the mean damage by all layers' weights, flattened one after the other, times ``vector``, float64."""
    sizes = [land.elements(name) for name, _ in land.layers]
    total = torch.zeros_like(vector)
    for i in range(len(land)):
        total += _batch_product(land, i, vector.split(sizes)).to(total)
    return total


def _batch_product(land: Landscape, i: int, parts: Sequence[Tensor]) -> Tensor:
    point = land.point(i)
    variables = [point.variables[place] for place in land.layers]
    direction = [part.reshape(v.shape).to(v) for part, v in zip(parts, variables, strict=True)]
    product = hessian_product(gradients(point.loss, variables), variables, direction)
    return torch.cat([h.detach().flatten() for h in product]).double()


def lanczos(
    product: Callable[[Tensor], Tensor], start: Tensor, steps: int, progress: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues of the tridiagonal matrix and their weights, ascending; fewer than ``steps`` where the vectors
    reachable from ``start`` run out.
    """
    basis = [start / start.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in track(range(min(steps, len(start))), "Lanczos steps", enabled=progress):
        rest = product(basis[-1])
        diagonal.append(float(rest @ basis[-1]))
        for _ in range(2):
            for v in basis:
                rest = rest - (rest @ v) * v
        length = float(rest.norm())
        if length <= EXHAUSTED * max(map(abs, (*diagonal, *beside))):
            break
        beside.append(length)
        basis.append(rest / length)
    size = len(diagonal)
    matrix = np.diag(diagonal) + np.diag(beside[: size - 1], 1) + np.diag(beside[: size - 1], -1)
    values, vectors = np.linalg.eigh(matrix)
    return values, vectors[0] ** 2
