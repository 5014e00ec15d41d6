"""Damage of every format alone and of every pair, from the same forwards: the Gauss-Newton Gram matrix.

Quantize one layer (or site) and record the shift u of the outputs. The inner products of these shifts, in the metric
of the damage, are the Gauss-Newton estimate of every second-order term d_i^T H d_j, at the cost of the forwards that
single damages need anyway ("Augmenting Hessians with Inter-Layer Dependencies", Schaefer et al., arXiv 2306.04879; the
Gram form is METHODS b, estimator 3). Only their cosines C are used (``pair_terms``); lengths come from the measured
damage: G = D C D with D_k = sqrt(2 damage_k), positive semi-definite, and half the sum of G over a plan predicts its
damage.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from quantkit.progress import track
from quantkit.sensitivity.measure import Damage, Perturbation, Scores, Subject, damage_for
from quantkit.sensitivity.pair_terms import pair_terms


def gram(subject: Subject, perturbations: Sequence[Perturbation], progress: bool = True) -> Scores:
    """Measure all perturbations: K forwards of the sample set, memory K x (output rows x classes) float32."""
    outputs = list(subject.outputs())
    reference = torch.cat(outputs)
    damage = damage_for(subject.loss, reference)
    shifts = torch.empty(len(perturbations), *reference.shape)
    means, errors = np.zeros(len(perturbations)), np.zeros(len(perturbations))
    for k, perturbation in enumerate(track(perturbations, "measuring formats", enabled=progress)):
        per_row = _measure(subject, perturbation, outputs, damage, shifts[k])
        means[k] = per_row.mean()
        errors[k] = per_row.std(correction=min(1, len(per_row) - 1)) / len(per_row) ** 0.5
    pairs = pair_terms(damage, reference, shifts, [p.owner for p in perturbations], [len(o) for o in outputs])
    lengths = np.sqrt(2 * means)
    matrix = pairs.cosines * np.outer(lengths, lengths)
    np.fill_diagonal(matrix, 2 * means)
    notes = {"damage": damage.name, "temperature": pairs.temperature, "reliability": pairs.reliability}
    return Scores(means, errors, matrix, notes)


def _measure(
    subject: Subject, one: Perturbation, reference: Sequence[Tensor], damage: Damage, shift: Tensor
) -> Tensor:
    """Damage per row (float64); the shift of the outputs is written into ``shift`` (rows, classes)."""
    losses, start = [], 0
    for before, after in zip(reference, subject.outputs([one]), strict=True):
        losses.append(damage.rows(before, after).double())
        shift[start : start + len(after)] = after - before
        start += len(after)
    return torch.cat(losses)
