"""Damage of every format alone and of every pair, from the same forwards: the Gauss-Newton Gram matrix.

Quantize one layer (or site) and record the shift u of the outputs. The inner products of these shifts, in the metric
of the damage, are the Gauss-Newton estimate of every second-order term d_i^T H d_j, at the cost of the forwards that
single damages need anyway ("Augmenting Hessians with Inter-Layer Dependencies", Schaefer et al., arXiv 2306.04879; the
Gram form is METHODS b, estimator 3). Only their cosines C are used (``pair_terms``); lengths come from the measured
damage: G = D C D with D_k = sqrt(2 damage_k), positive semi-definite, and half the sum of G over a plan predicts its
damage. Around a base plan, where damage may fall, the lengths are those of the shifts in the metric at the base.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from quantkit.progress import track
from quantkit.sensitivity.measure import Damage, Perturbation, Scores, Subject, damage_for, mean_and_error, notes_on
from quantkit.sensitivity.pair_terms import gram_matrix, pair_terms
from quantkit.sensitivity.registry import estimator


@estimator("gram")
def gram(
    subject: Subject,
    perturbations: Sequence[Perturbation],
    progress: bool = True,
    generator: torch.Generator | None = None,
) -> Scores:
    """Measure all perturbations: K forwards of the sample set, memory K x (output rows x classes) float32. Nothing is
    drawn from ``generator``.
    """
    reference = list(subject.float_outputs())
    outputs = list(subject.outputs()) if subject.base else reference
    here = torch.cat(outputs)
    damage = damage_for(subject.loss, torch.cat(reference))
    before = torch.cat([damage.rows(a, b).double() for a, b in zip(reference, outputs, strict=True)])
    shifts = torch.empty(len(perturbations), *here.shape)
    means, errors = np.zeros(len(perturbations)), np.zeros(len(perturbations))
    for k, perturbation in enumerate(track(perturbations, "measuring formats", enabled=progress)):
        rows = _measure(subject, perturbation, reference, damage, shifts[k])
        shifts[k] -= here
        means[k], errors[k] = mean_and_error(rows - before)
    pairs = pair_terms(damage, here, shifts, [p.owner for p in perturbations], [len(o) for o in outputs])
    lengths = np.sqrt(2 * means) if not subject.base else _lengths(damage, here, shifts)
    matrix = pairs.cosines * np.outer(lengths, lengths)
    np.fill_diagonal(matrix, 2 * means)
    notes = notes_on(subject, damage, before)
    notes |= {"temperature": pairs.temperature, "reliability": pairs.reliability}
    return Scores(means, errors, matrix, notes)


def _measure(
    subject: Subject, one: Perturbation, reference: Sequence[Tensor], damage: Damage, outputs: Tensor
) -> Tensor:
    """Damage per row (float64); the outputs are written into ``outputs`` (rows, classes)."""
    losses, start = [], 0
    for before, after in zip(reference, subject.outputs([one]), strict=True):
        losses.append(damage.rows(before, after).double())
        outputs[start : start + len(after)] = after
        start += len(after)
    return torch.cat(losses)


def _lengths(damage: Damage, here: Tensor, shifts: Tensor) -> np.ndarray:
    """Lengths (K) of the shifts in the metric at the outputs ``here``."""
    return np.sqrt(np.diag(gram_matrix(damage, here, shifts, 1.0, [slice(0, len(here))])) / len(here))
