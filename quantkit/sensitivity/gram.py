"""Damage of every format alone and of every pair, from the same forwards: the Gauss-Newton Gram matrix.

Quantize one layer (or site), record the shift u of the outputs; A = sqrt(p) (u - E_p u) / sqrt(N). The Gram matrix of
all A is the Gauss-Newton estimate of every second-order term d_i^T H d_j of the KL divergence, positive semi-definite
by construction, at the cost of the forwards that single damages need anyway ("Augmenting Hessians with Inter-Layer
Dependencies", Schaefer et al., arXiv 2306.04879; the Gram form is METHODS b, estimator 3). Its diagonal is then scaled
to the measured damage: G' = D G D with D_k = sqrt(2 damage_k / G_kk), which keeps it positive semi-definite.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from quantkit.progress import track
from quantkit.sensitivity.measure import Damage, Perturbation, Scores, Subject, damage_for


def gram(subject: Subject, perturbations: Sequence[Perturbation], progress: bool = True) -> Scores:
    """Measure all perturbations: K forwards of the sample set, memory K x (output rows x classes) float32."""
    reference = list(subject.outputs())
    damage = damage_for(subject.loss, reference[0])
    rows = sum(len(r) for r in reference)
    shifts = torch.empty(len(perturbations), sum(r.numel() for r in reference))
    means, errors = np.zeros(len(perturbations)), np.zeros(len(perturbations))
    for k, perturbation in enumerate(track(perturbations, "measuring formats", enabled=progress)):
        per_row, shift = _measure(subject, perturbation, reference, damage)
        shifts[k] = shift / rows**0.5
        means[k] = per_row.mean()
        errors[k] = per_row.std() / max(1, rows) ** 0.5
    return Scores(means, errors, scaled_gram(gram_matrix(shifts), means))


def _measure(
    subject: Subject, one: Perturbation, reference: Sequence[Tensor], damage: Damage
) -> tuple[Tensor, Tensor]:
    """Damage per row (float64) and the flattened shift of all rows."""
    losses, shifts = [], []
    for before, after in zip(reference, subject.outputs([one]), strict=True):
        losses.append(damage.rows(before, after).double())
        shifts.append(damage.shift(before, after).flatten())
    return torch.cat(losses), torch.cat(shifts)


def gram_matrix(shifts: Tensor) -> np.ndarray:
    """All inner products of the rows of ``shifts`` (K, M), summed in float64 over slices of M to bound memory."""
    total = torch.zeros(len(shifts), len(shifts), dtype=torch.float64)
    for part in shifts.split(1 << 16, dim=1):
        wide = part.double()
        total += wide @ wide.T
    return total.numpy()


def scaled_gram(matrix: np.ndarray, damage: np.ndarray) -> np.ndarray:
    """D G D with D_k = sqrt(2 damage_k / G_kk): the diagonal becomes twice the measured damage, definiteness stays."""
    diagonal = np.diag(matrix)
    factor = np.sqrt(np.divide(2 * damage, diagonal, out=np.zeros_like(damage), where=diagonal > 0))
    scaled = matrix * np.outer(factor, factor)
    np.fill_diagonal(scaled, 2 * damage)
    return scaled
