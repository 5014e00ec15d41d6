"""What every estimator works on: a float model, inputs to measure on, and the perturbations whose damage is asked
for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantkit.numbers.kinds import AnyQuantizer
from quantkit.plan import saturated
from quantkit.program.inputs import Batch
from quantkit.program.layers import Weights
from quantkit.program.program import Program
from quantkit.program.record import run_model
from quantkit.program.sites import Site
from quantkit.program.updates import plain_mode, restored
from quantkit.sensitivity.outputs import OutputRule, Outputs
from quantkit.simulation.model import at_sites, run_with
from quantkit.store import Artefacts

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
    ``weights`` says where those of the layers are, ``program`` is one that stands for the model, for replays.
    ``rule``: which outputs count, found in the first run where it is not given. ``artefacts``: where estimators that
    go from layer to layer keep what is finished; its key covers all the rest.
    """

    model: nn.Module
    batches: Sequence[Batch]
    sites: Mapping[str, Site]
    loss: str = "auto"
    base: Sequence[Perturbation] = ()
    artefacts: Artefacts = field(default_factory=Artefacts)
    weights: Weights | None = None
    program: Program | None = None
    rule: OutputRule | None = None

    @property
    def floats(self) -> Weights:
        """The weights of the model's layers; of modules of the common kinds where nothing else is said."""
        return Weights.of_modules(self.model) if self.weights is None else self.weights

    def outputs(self, perturbations: Sequence[Perturbation] = ()) -> Iterator[Outputs]:
        """The model's outputs that count for each batch, each (samples x positions, classes), with the base plan and,
        where they differ from it, the perturbations in place.
        """
        return self.outputs_with(*applied([*self.base, *perturbations]))

    def float_outputs(self) -> Iterator[Outputs]:
        """The float model's outputs, whatever the base: what damage is measured against."""
        return self.outputs_with({}, {})

    def outputs_with(
        self, weights: Mapping[str, Tensor], at: Mapping[str, Callable[[Tensor], Tensor]]
    ) -> Iterator[Outputs]:
        """The outputs with these weights (layer -> tensor) and these functions applied to the tensors of sites; the
        base plan is not added.
        """
        change = at_sites([self.sites[name] for name in at], lambda site, x: at[site.name](x))
        floats, updated = self.floats, () if self.program is None else self.program.updated
        for args, kwargs in self.batches:
            # nothing is held while the caller looks at the outputs: it may not ask for all of them
            with plain_mode(self.model), restored(self.model, updated), swapped_weights(floats, weights):
                operands = floats.operands(weights)
                if at or operands:
                    result = run_with(self.model, change, args, kwargs, operands=operands)
                else:
                    result = run_model(self.model, (args, kwargs), ())
            if self.rule is None:
                self.rule = OutputRule.of(self.model, result, (args, kwargs), self.loss)
            yield self.rule.rows(result, (args, kwargs))


LayerValues = dict[str, Tensor]
AtSites = dict[str, Callable[[Tensor], Tensor]]


def applied(perturbations: Iterable[Perturbation]) -> tuple[LayerValues, AtSites]:
    """What layers compute with (layer -> weight) and what sites do to their tensors; a later perturbation wins."""
    changes = {p.place: p.change for p in perturbations}
    weights = {owner: c.dequantize() for (owner, _), c in changes.items() if c.stored}
    at: AtSites = {owner: c.fake_quantize for (owner, _), c in changes.items() if not c.stored}
    return weights, at


@contextmanager
def swapped_weights(floats: Weights, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Layers compute with these weights inside the block, and with their own again after it, whatever happens."""
    undone: list[Callable[[], None]] = []
    try:
        for layer, values in weights.items():
            undone.append(floats.swap(layer, values))
        yield
    finally:
        for undo in reversed(undone):
            undo()


def random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """+1 or -1 for every element, each with probability one half (Rademacher), drawn on the CPU."""
    return torch.randint(0, 2, like.shape, generator=generator, device="cpu").to(like).mul_(2).sub_(1)
