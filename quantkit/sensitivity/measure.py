"""What every estimator works on: a float model, inputs to measure on, and the perturbations whose damage is asked
for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from quantkit.errors import InvalidRequest
from quantkit.graph.layers import weight_of
from quantkit.graph.sites import Site
from quantkit.graph.trace import run_model
from quantkit.kernels.reference import QuantizedWeight, SiteRange
from quantkit.quantizers.simulate import at_sites, run_with

Batch = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Perturbation:
    """One format of one layer (``change`` are its codes) or of one site (``change`` is its range)."""

    owner: str
    format: str
    change: QuantizedWeight | SiteRange


@dataclass(frozen=True)
class Scores:
    """Damage of each perturbation alone (K), its standard error over samples (K), and pair terms (K, K) or None.

    Loss units, higher is worse; ``gram`` is scaled so that gram[k, k] = 2 damage[k]. ``notes``: how it was measured.
    """

    damage: np.ndarray
    standard_error: np.ndarray
    gram: np.ndarray | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Subject:
    """The model under study. ``batches`` are the inputs to measure on, ``sites`` where activations can be
    perturbed.
    """

    model: nn.Module
    batches: Sequence[Batch]
    sites: Mapping[str, Site]
    loss: str = "auto"

    def outputs(self, perturbations: Sequence[Perturbation] = ()) -> Iterator[Tensor]:
        """The model's output (samples x positions, classes) for each batch, with the perturbations in place."""
        ranges = {p.owner: p.change for p in perturbations if isinstance(p.change, SiteRange)}
        change = at_sites([self.sites[name] for name in ranges], lambda site, x: ranges[site.name].fake_quantize(x))
        with torch.no_grad(), _swapped_weights(self.model, perturbations):
            for args, kwargs in self.batches:
                result = (
                    run_with(self.model, change, args, kwargs) if ranges else run_model(self.model, (args, kwargs))
                )
                yield rows_of(main_output(result))


@contextmanager
def _swapped_weights(model: nn.Module, perturbations: Sequence[Perturbation]) -> Iterator[None]:
    saved: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for p in perturbations:
            if isinstance(p.change, QuantizedWeight):
                weight = weight_of(model, p.owner)
                saved.append((weight, weight.data))
                weight.data = p.change.dequantize().to(weight)
        yield
    finally:
        for weight, data in reversed(saved):
            weight.data = data


def main_output(result: Any) -> Tensor:
    """The tensor the damage is measured on: ``logits`` of a dict or record, else the first floating-point tensor."""
    named = result.get("logits") if isinstance(result, Mapping) else getattr(result, "logits", None)
    candidates = [named] if isinstance(named, Tensor) else tree_flatten(result)[0]
    for tensor in candidates:
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            return tensor
    raise InvalidRequest(
        "The model returns no floating-point tensor, so there is nothing to compare with the float model."
    )


def rows_of(output: Tensor) -> Tensor:
    """(rows, classes): classes are dimension 1 of image-like outputs (N, C, H, W), the last dimension otherwise."""
    if output.dim() >= 4:
        output = output.movedim(1, -1)
    return output.reshape(-1, output.shape[-1]).float() if output.dim() > 1 else output.reshape(-1, 1).float()


def kl_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row, in nats; never below zero."""
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)


@dataclass(frozen=True)
class KLDamage:
    """KL divergence to the float model's own distribution: no labels, zero gradient at the float point (METHODS
    0.1).
    """

    name = "KL divergence of the output distribution"
    softens = True

    def rows(self, reference: Tensor, output: Tensor) -> Tensor:
        return kl_rows(reference.log_softmax(-1), output.log_softmax(-1))

    def metric(self, reference: Tensor, shift: Tensor, temperature: float) -> Tensor:
        """Vectors whose inner products are the Gauss-Newton terms of KL: sqrt(p) (u - E_p u), u the shift of the
        logits, p the softmax of ``reference`` / ``temperature``.
        """
        p = (reference / temperature).softmax(-1)
        return p.sqrt() * (shift - (p * shift).sum(-1, keepdim=True))


@dataclass(frozen=True)
class SquaredError:
    """Half the squared shift of the outputs, relative to the mean square ``scale`` of the float model's: for outputs
    that are no logits.
    """

    scale: float
    name = "squared error of the outputs"
    softens = False

    def rows(self, reference: Tensor, output: Tensor) -> Tensor:
        return 0.5 * (output - reference).square().sum(-1) / self.scale

    def metric(self, reference: Tensor, shift: Tensor, temperature: float) -> Tensor:
        """The shift itself; the metric is flat, ``temperature`` changes nothing."""
        return shift


Damage = KLDamage | SquaredError
LOSSES = ("kl", "mse")


def damage_for(loss: str, reference: Tensor) -> Damage:
    """The damage measure, given all outputs (rows, classes) of the float model: as named, or "auto": KL where rows
    have at least two classes, squared error otherwise.
    """
    if loss not in ("auto", *LOSSES):
        raise InvalidRequest(f"Unknown loss {loss!r}; known: auto, {', '.join(LOSSES)}.")
    if loss == "kl" or (loss == "auto" and reference.shape[-1] >= 2):
        return KLDamage()
    return SquaredError(max(float(reference.double().square().sum(-1).mean()), 1e-24))
