"""Measured damage of whole plans, and of every single change of one: what improving a plan asks for.

The second order around a plan, not around the float model: with q the outputs of the plan, its metric weighs the
shifts that changes of the plan make (DESIGN 5.4).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from quantkit.progress import track
from quantkit.sensitivity.measure import Perturbation, Subject, damage_for
from quantkit.sensitivity.pair_terms import gram_matrix, pair_terms


class PlanDamage:
    """Measures plans given as positions in ``perturbations``, against the outputs of the float model."""

    def __init__(self, subject: Subject, perturbations: Sequence[Perturbation], progress: bool = True) -> None:
        self.subject, self.perturbations, self.progress = subject, perturbations, progress
        self.reference = list(subject.outputs())
        self.damage = damage_for(subject.loss, torch.cat(self.reference))

    def plan(self, entries: Sequence[int], share: float = 1.0) -> float:
        """Mean damage of a plan on the first batches, ``share`` of them but at least one."""
        count = max(1, round(share * len(self.reference)))
        part = Subject(self.subject.model, self.subject.batches[:count], self.subject.sites, self.subject.loss)
        outputs = part.outputs([self.perturbations[k] for k in entries])
        losses = [self.damage.rows(a, b).double() for a, b in zip(self.reference, outputs, strict=False)]
        return float(torch.cat(losses).mean())

    def around(self, entries: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(damage (K,) of the plan with each entry in place of its owner's, pair terms (K, K) of the changes)."""
        owner = [p.owner for p in self.perturbations]
        kind = [type(p.change) for p in self.perturbations]
        place = {(owner[k], kind[k]): k for k in entries}
        outputs = list(self.subject.outputs([self.perturbations[k] for k in entries]))
        here = torch.cat(outputs)
        reference = torch.cat(self.reference)
        damage = np.full(len(owner), float(self.damage.rows(reference, here).double().mean()))
        shifts = torch.zeros(len(owner), *here.shape)
        others = [k for k in range(len(owner)) if k not in set(entries)]
        for k in track(others, "measuring changes of the plan", enabled=self.progress):
            changed = place | {(owner[k], kind[k]): k}
            output = torch.cat(list(self.subject.outputs([self.perturbations[j] for j in changed.values()])))
            damage[k] = float(self.damage.rows(reference, output).double().mean())
            shifts[k] = output - here
        return damage, self._pair_terms(here, shifts, [len(o) for o in outputs], owner)

    def _pair_terms(self, here: Tensor, shifts: Tensor, sizes: Sequence[int], owners: Sequence[str]) -> np.ndarray:
        """Trusted cosines, with the lengths that the metric at the plan gives the shifts."""
        pairs = pair_terms(self.damage, here, shifts, owners, sizes)
        lengths = np.sqrt(np.diag(gram_matrix(self.damage, here, shifts, 1.0, [slice(0, len(here))])) / len(here))
        return pairs.cosines * np.outer(lengths, lengths)
