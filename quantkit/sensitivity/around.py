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
from quantkit.sensitivity.measure import KLDamage, Perturbation, Subject, damage_for, damage_rows
from quantkit.sensitivity.pair_terms import gram_matrix, pair_terms
from quantkit.sensitivity.sketch import sketch_for


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
        damage = np.full(len(owner), float(damage_rows(self.damage, self.reference, outputs).mean()))
        is_logits = isinstance(self.damage, KLDamage)
        sketch = sketch_for(self.reference, len(owner), is_logits, torch.Generator().manual_seed(0))
        small = outputs if sketch is None else [sketch(i, o) for i, o in enumerate(outputs)]
        here = torch.cat(small)
        shifts = torch.zeros(len(owner), *here.shape)
        others = [k for k in range(len(owner)) if k not in set(entries)]
        for k in track(others, "measuring changes of the plan", enabled=self.progress):
            changed = place | {(owner[k], kind[k]): k}
            output = list(self.subject.outputs([self.perturbations[j] for j in changed.values()]))
            damage[k] = float(damage_rows(self.damage, self.reference, output).mean())
            shifts[k] = torch.cat(output if sketch is None else [sketch(i, o) for i, o in enumerate(output)]) - here
        return damage, self._pair_terms(here, shifts, [len(o) for o in small], owner)

    def _pair_terms(self, here: Tensor, shifts: Tensor, sizes: Sequence[int], owners: Sequence[str]) -> np.ndarray:
        """Trusted cosines, with the lengths that the metric at the plan gives the shifts."""
        pairs = pair_terms(self.damage, here, shifts, owners, sizes)
        lengths = np.sqrt(np.diag(gram_matrix(self.damage, here, shifts, 1.0, [slice(0, len(here))])) / len(here))
        return pairs.cosines * np.outer(lengths, lengths)
