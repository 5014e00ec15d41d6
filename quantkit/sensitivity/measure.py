"""What every estimator works on: a float model, inputs to measure on, and the perturbations whose damage is asked
for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from quantkit.errors import InvalidRequest
from quantkit.numbers.kinds import AnyQuantizer
from quantkit.plan import saturated
from quantkit.program.layers import weight_of
from quantkit.program.sites import Site
from quantkit.program.trace import run_model
from quantkit.simulation.model import at_sites, run_with
from quantkit.store import Artefacts

Batch = tuple[tuple[Any, ...], dict[str, Any]]
Place = tuple[str, bool]  # a layer's weight (name, False) or a site's tensor (name, True)


@dataclass(frozen=True)
class Perturbation:
    """One format of one layer (``change`` are its codes) or of one site (``change`` is its range)."""

    owner: str
    format: str
    change: AnyQuantizer

    @property
    def at_site(self) -> bool:
        return not self.change.stored

    @property
    def place(self) -> Place:
        """What is changed: a site may be named as the layer that makes it."""
        return self.owner, self.at_site


@dataclass(frozen=True)
class Scores:
    """Damage of each perturbation alone (K), its standard error over samples or draws (K), and pair terms (K, K) or
    None.

    Loss units, higher is worse; ``gram`` is scaled so that gram[k, k] = 2 damage[k]. Of a subject with a base plan,
    ``damage`` is the increase over the base, below zero where a format is better than the base's; half the sum of
    ``gram`` over a plan, ``saturated`` with ``saturation`` and ``growth``, predicts the plan's increase. ``notes``:
    how it was measured. ``ranking``: the numbers only order layers; they are in no unit and must not be added up.
    """

    damage: np.ndarray
    standard_error: np.ndarray
    gram: np.ndarray | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    ranking: bool = False
    saturation: float = 0.0
    growth: float = 0.0

    def predict(self, chosen: Sequence[int]) -> float:
        """Damage of a plan, given the positions of its perturbations: by pair terms where there are any."""
        if self.gram is None:
            return float(self.damage[list(chosen)].sum())
        return float(saturated(0.5 * self.gram[np.ix_(chosen, chosen)].sum(), self.saturation, self.growth))


@dataclass
class Subject:
    """The model under study. ``batches`` are the inputs to measure on, ``sites`` where activations can be perturbed.

    ``base``: the plan to measure around, at most one perturbation per layer and site; empty is the float model.
    ``artefacts``: where estimators that go from layer to layer keep what is finished; its key covers all the rest.
    """

    model: nn.Module
    batches: Sequence[Batch]
    sites: Mapping[str, Site]
    loss: str = "auto"
    base: Sequence[Perturbation] = ()
    artefacts: Artefacts = field(default_factory=Artefacts)

    def outputs(self, perturbations: Sequence[Perturbation] = ()) -> Iterator[Tensor]:
        """The model's output (samples x positions, classes) for each batch, with the base plan and, where they differ
        from it, the perturbations in place.
        """
        return self.outputs_with(*applied([*self.base, *perturbations]))

    def float_outputs(self) -> Iterator[Tensor]:
        """The float model's outputs, whatever the base: what damage is measured against."""
        return replace(self, base=()).outputs()

    def outputs_with(
        self, weights: Mapping[str, Tensor], at: Mapping[str, Callable[[Tensor], Tensor]]
    ) -> Iterator[Tensor]:
        """The outputs with these weights (layer -> tensor) and these functions applied to the tensors of sites; the
        base plan is not added.
        """
        change = at_sites([self.sites[name] for name in at], lambda site, x: at[site.name](x))
        for args, kwargs in self.batches:
            # nothing is held while the caller looks at the outputs: it may not ask for all of them
            with torch.no_grad(), without_autocast(self.model), swapped_weights(self.model, weights):
                result = run_with(self.model, change, args, kwargs) if at else run_model(self.model, (args, kwargs))
            yield rows_of(main_output(result))


Weights = dict[str, Tensor]
AtSites = dict[str, Callable[[Tensor], Tensor]]


def applied(perturbations: Iterable[Perturbation]) -> tuple[Weights, AtSites]:
    """What layers compute with (layer -> weight) and what sites do to their tensors; a later perturbation wins."""
    changes = {p.place: p.change for p in perturbations}
    weights = {owner: c.dequantize() for (owner, _), c in changes.items() if c.stored}
    at: AtSites = {owner: c.fake_quantize for (owner, _), c in changes.items() if not c.stored}
    return weights, at


@contextmanager
def swapped_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Layers compute with these weights inside the block, and with their own again after it, whatever happens."""
    saved: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for layer, values in weights.items():
            weight = weight_of(model, layer)
            saved.append((weight, weight.data))
            weight.data = values.to(weight)
        yield
    finally:
        for weight, data in reversed(saved):
            weight.data = data


def without_autocast(model: nn.Module) -> torch.autocast:
    """Plain float32 inside the block, whatever the caller's code is wrapped in."""
    return torch.autocast(next((p.device.type for p in model.parameters()), "cpu"), enabled=False)


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
    """(rows, classes): classes are dimension 1 of image-like outputs (N, C, H, W), the last dimension otherwise. A
    class that is masked by minus infinity becomes finite, and stays impossible: infinities have no differences.
    """
    if output.dim() >= 4:
        output = output.movedim(1, -1)
    rows = output.reshape(-1, output.shape[-1]) if output.dim() > 1 else output.reshape(-1, 1)
    return rows.float().masked_fill(rows == -math.inf, MASKED)


def random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """+1 or -1 for every element, each with probability one half (Rademacher), drawn on the CPU."""
    return torch.randint(0, 2, like.shape, generator=generator).to(like).mul_(2).sub_(1)


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

    def smooth_rows(self, reference: Tensor, output: Tensor, temperature: float = 1.0) -> Tensor:
        """``rows`` to be differentiated: rounding takes a divergence of zero below zero, where ``rows`` is flat.

        Above a temperature of 1 both distributions are softened, and the divergence is multiplied by its square, which
        keeps the size of its gradients (Hinton et al., arXiv 1503.02531, section 2.1).
        """
        log_p = (reference / temperature).log_softmax(-1)
        return temperature**2 * (log_p.exp() * (log_p - (output / temperature).log_softmax(-1))).sum(-1)

    def cotangent(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Random rows c with E[c c^T] = diag(p) - p p^T, the Hessian of the divergence at ``output``: e_y - p, y a
        label drawn from p. Minus the gradient of the cross entropy to y, hence the Fisher information.
        """
        p = output.softmax(-1)
        label = torch.multinomial(p.cpu(), 1, generator=generator).to(p.device)
        return torch.zeros_like(p).scatter_(-1, label, 1.0) - p

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

    def smooth_rows(self, reference: Tensor, output: Tensor, temperature: float = 1.0) -> Tensor:
        """``rows``, which are smooth and have no temperature."""
        return self.rows(reference, output)

    def cotangent(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Random rows c with E[c c^T] = 1 / scale, the Hessian of the squared error: random signs."""
        return random_signs(output, generator) / self.scale**0.5

    def metric(self, reference: Tensor, shift: Tensor, temperature: float) -> Tensor:
        """The shift over the root of the scale; the metric is flat, ``temperature`` changes nothing."""
        return shift / self.scale**0.5


# At which training samples are compared where a decision follows: a network is too sure of them for damage itself
SOFTENED = 4.0
MASKED = -1e4  # a logit of probability zero, also where outputs are softened
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


def damage_rows(damage: Damage, reference: Iterable[Tensor], outputs: Iterable[Tensor]) -> Tensor:
    """Damage of each row over all batches, float64."""
    return torch.cat([damage.rows(a, b).double() for a, b in zip(reference, outputs, strict=True)])


def notes_on(subject: Subject, damage: Damage, here: Tensor) -> dict[str, Any]:
    """What was measured, and around a base plan the base's own damage, given the damage ``here`` of its rows."""
    return {"damage": damage.name} | ({"base_damage": float(here.mean())} if subject.base else {})


def mean_and_error(rows: Tensor) -> tuple[float, float]:
    """Mean of independent numbers and its standard error."""
    return float(rows.mean()), float(rows.std(correction=min(1, len(rows) - 1))) / len(rows) ** 0.5
