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
from quantkit.sensitivity.measure import KLDamage, Perturbation, Subject, damage_for
from quantkit.sensitivity.pair_terms import metric_lengths, pair_terms, sample_numbers
from quantkit.sensitivity.replay import variations
from quantkit.sensitivity.sketch import sketch_for


class PlanDamage:
    """Measures plans given as positions in ``perturbations``, against the outputs of the float model; with a
    ``temperature`` above 1, by the damage of softened outputs.
    """

    def __init__(
        self,
        subject: Subject,
        perturbations: Sequence[Perturbation],
        progress: bool = True,
        temperature: float = 1.0,
    ) -> None:
        self.subject, self.perturbations, self.progress = subject, perturbations, progress
        self.temperature = temperature
        self.reference = list(subject.float_outputs())
        self.damage = damage_for(subject.loss, torch.cat(self.reference))

    def plans(self, many: Sequence[Sequence[int]], share: float = 1.0) -> list[float]:
        """Mean damage of each plan, of which ``rows`` are the parts."""
        return [float(one.mean()) for one in self.rows(many, share)]

    def rows(self, many: Sequence[Sequence[int]], share: float = 1.0) -> list[np.ndarray]:
        """Damage of each plan on the first inputs, ``share`` of them: (samples,), each weighed by its number of output
        rows. The rows of one sample, as its tokens are, say much the same: they are no numbers of their own.
        """
        return [one[0] for one in self.rows_at([self.temperature], many, share)]

    def rows_at(
        self, temperatures: Sequence[float], many: Sequence[Sequence[int]], share: float = 1.0
    ) -> list[np.ndarray]:
        """The same at several temperatures, (temperatures, samples), for one run of each plan.

        Plans that differ from the first in a few late layers cost little more than it.
        """
        part = replace(self.subject, batches=_first_part(self.subject.batches, share))
        chosen = [[self.perturbations[k] for k in entries] for entries in many]
        rows: list[list[Tensor]] = [[] for _ in many]
        steps = len(many) * len(part.batches)
        for batch, plan, output in track(variations(part, chosen), "measuring plans", steps, enabled=self.progress):
            rows[plan].append(torch.stack([self._rows(batch, output, t) for t in temperatures]))
        numbers = sample_numbers([one.shape[1] for one in rows[0]], [batch_size(b) for b in part.batches])
        sums = torch.zeros(len(temperatures), int(numbers.max()) + 1).double()
        scale = sums.shape[1] / len(numbers)
        return [(scale * sums.index_add(1, numbers, torch.cat(one, 1))).numpy() for one in rows]

    def around(self, entries: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(damage (K,) of the plan with each entry in place of its owner's, pair terms (K, K) of the changes)."""
        place = {self.perturbations[k].place: k for k in entries}
        others = [k for k in range(len(self.perturbations)) if k not in set(entries)]
        plans = [[*entries], *([*(place | {self.perturbations[k].place: k}).values()] for k in others)]
        sketch = sketch_for(
            self.reference,
            len(self.perturbations),
            isinstance(self.damage, KLDamage),
            torch.Generator().manual_seed(0),
        )
        kept: list[list[Tensor]] = [[] for _ in plans]
        rows: list[list[Tensor]] = [[] for _ in plans]
        measured = variations(self.subject, [[self.perturbations[k] for k in plan] for plan in plans])
        steps = len(plans) * len(self.reference)
        for batch, plan, output in track(measured, "measuring around the plan", steps, enabled=self.progress):
            rows[plan].append(self._rows(batch, output, self.temperature))
            kept[plan].append(output if sketch is None else sketch(batch, output))
        means = [float(torch.cat(one).mean()) for one in rows]
        damage = np.full(len(self.perturbations), means[0])
        damage[others] = means[1:]
        here = torch.cat(kept[0])
        shifts = torch.zeros(len(self.perturbations), *here.shape)
        for k, one in zip(others, kept[1:], strict=True):
            shifts[k] = torch.cat(one) - here
        samples = sample_numbers([len(r) for r in self.reference], [batch_size(b) for b in self.subject.batches])
        return damage, self._pair_terms(here, shifts, samples if sketch is None else sketch.of_kept(samples))

    def _rows(self, batch: int, output: Tensor, temperature: float) -> Tensor:
        """Damage of each row of a batch, or of its first rows, float64."""
        reference = self.reference[batch][: len(output)]
        if temperature == 1:
            return self.damage.rows(reference, output).double()
        return self.damage.smooth_rows(reference, output, temperature).double()

    def _pair_terms(self, here: Tensor, shifts: Tensor, samples: Tensor) -> np.ndarray:
        """Trusted cosines, with the lengths that the metric at the plan gives the shifts."""
        pairs = pair_terms(self.damage, here, shifts, [p.owner for p in self.perturbations], samples)
        lengths = metric_lengths(self.damage, here, shifts, self.temperature)
        return pairs.cosines * np.outer(lengths, lengths)


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
