"""Measured damage of whole plans, and of every single change of one: what improving a plan asks for.

The second order around a plan, not around the float model: with q the outputs of the plan, its metric weighs the
shifts that changes of the plan make (docs/methods/operating-point.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from quantkit.program.inputs import Batch, batch_size, first_samples
from quantkit.progress import track
from quantkit.sensitivity.damage import Reference, RunningDamage
from quantkit.sensitivity.measure import Perturbation, Subject
from quantkit.sensitivity.outputs import Outputs, joined
from quantkit.sensitivity.pair_terms import Shifts, metric_lengths, pair_terms
from quantkit.sensitivity.replay import variations
from quantkit.sensitivity.sketch import Sketches


class PlanDamage:
    """Measures plans given as positions in ``perturbations``, against the outputs of the float model; with a
    ``temperature`` above 1, by the damage of softened outputs.
    """

    def __init__(
        self, subject: Subject, perturbations: Sequence[Perturbation], progress: bool = True, temperature: float = 1.0
    ) -> None:
        self.subject, self.perturbations, self.progress = subject, perturbations, progress
        self.temperature = temperature
        self.reference = Reference.of(subject)
        self.damage = self.reference.damage

    def plans(self, many: Sequence[Sequence[int]], share: float = 1.0) -> list[float]:
        """Mean damage of each plan on the first inputs, ``share`` of them."""
        return [float(one.mean()) for one in self.rows_at([self.temperature], many, share)]

    def rows_at(
        self, temperatures: Sequence[float], many: Sequence[Sequence[int]], share: float = 1.0
    ) -> list[np.ndarray]:
        """Damage of each plan at several temperatures, (temperatures, samples), each sample weighed by its number of
        output rows. The rows of one sample, as its tokens are, say much the same: they are no numbers of their own.

        Plans that differ from the first in a few late layers cost little more than it.
        """
        part = replace(self.subject, batches=_first_part(self.subject.batches, share))
        chosen = [[self.perturbations[k] for k in entries] for entries in many]
        rows = [[RunningDamage(self.damage) for _ in temperatures] for _ in many]
        counts: list[list[int]] = []
        steps = len(many) * len(part.batches)
        for batch, plan, outputs in track(variations(part, chosen), "measuring plans", steps, enabled=self.progress):
            if plan == 0:
                counts.append([len(one) for one in outputs])
            for running, temperature in zip(rows[plan], temperatures, strict=True):
                running.update(self._float(batch, outputs), outputs, temperature)
        numbers = self.damage.rule.samples(part.batches, counts)
        return [np.stack([_by_sample(running, numbers) for running in one]) for one in rows]

    def around(self, entries: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(damage (K,) of the plan with each entry in place of its owner's, pair terms (K, K) of the changes)."""
        place = {self.perturbations[k].place: k for k in entries}
        others = [k for k in range(len(self.perturbations)) if k not in set(entries)]
        plans = [[*entries], *([*(place | {self.perturbations[k].place: k}).values()] for k in others)]
        sketches = Sketches.of(self.reference, len(self.perturbations), torch.Generator().manual_seed(0))
        kept: list[list[Outputs]] = [[] for _ in plans]
        rows = [RunningDamage(self.damage) for _ in plans]
        measured = variations(self.subject, [[self.perturbations[k] for k in plan] for plan in plans])
        steps = len(plans) * len(self.reference.outputs)
        for batch, plan, outputs in track(measured, "measuring around the plan", steps, enabled=self.progress):
            rows[plan].update(self._float(batch, outputs), outputs, self.temperature)
            kept[plan].append(sketches(batch, outputs))
        damage = np.full(len(self.perturbations), rows[0].mean)
        damage[others] = [one.mean for one in rows[1:]]
        here = joined(kept[0])
        shifts = [torch.zeros(len(self.perturbations), *one.shape, dtype=torch.float32, device="cpu") for one in here]
        for k, batches in zip(others, kept[1:], strict=True):
            for o, one in enumerate(joined(batches)):
                shifts[o][k] = one - here[o]
        samples = sketches.of_kept(self.reference.samples())
        moved = [Shifts(*one) for one in zip(self.damage.measures, here, shifts, samples, strict=True)]
        pairs = pair_terms(moved, [p.owner for p in self.perturbations])
        lengths = metric_lengths(moved, self.temperature)
        return damage, pairs.cosines * np.outer(lengths, lengths)

    def _float(self, batch: int, outputs: Outputs) -> Outputs:
        """The float model's outputs for a batch, or for its first samples."""
        return tuple(a[: len(b)] for a, b in zip(self.reference.outputs[batch], outputs, strict=True))


def _by_sample(running: RunningDamage, numbers: Sequence[Tensor]) -> np.ndarray:
    """The damage by sample, given the sample of each row, by output; its mean is that over the rows."""
    count = 1 + max(int(every.max()) for every in numbers)
    found = [
        count / len(every) * torch.zeros(count, dtype=torch.float64, device="cpu").index_add(0, every, rows)
        for rows, every in zip(running.rows, numbers, strict=True)
    ]
    return torch.stack(found).sum(0).numpy()


def _first_part(batches: Sequence[Batch], share: float) -> list[Batch]:
    """The first ``share`` of all samples, at least one, in batches as they are but for the last."""
    left = max(1, round(share * sum(map(batch_size, batches))))
    found: list[Batch] = []
    for batch in batches:
        if left <= 0:
            break
        found.append(batch if batch_size(batch) <= left else first_samples(batch, left))
        left -= batch_size(batch)
    return found
