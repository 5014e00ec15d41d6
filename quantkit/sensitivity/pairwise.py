"""CLADO: pair terms by forward differences, I_kl = L(k, l) - L(k) - L(l) + L(neither).

Exact on a quadratic, gradient included (Deng et al., arXiv 2307.05657; docs/methods/exact-pairs.md), and it sees what
second order does not; but it costs a forward of the sample set per pair, and the matrix is indefinite. It is projected
to the nearest positive semi-definite one by zeroing negative eigenvalues, and scaled back to the measured damages on
its diagonal, which keeps it so.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from quantkit.errors import InvalidRequest
from quantkit.sensitivity.by_place import Found, by_place
from quantkit.sensitivity.damage import Reference, RunningDamage, notes_on
from quantkit.sensitivity.measure import Perturbation, Scores, Subject
from quantkit.sensitivity.registry import Cost, estimator

MOST_FORWARDS = 20_000


@estimator("pairwise", Cost(lambda work: work.formats**2 * (1 - 1 / work.places) / 2 + work.formats + 1))
def pairwise(
    subject: Subject, perturbations: Sequence[Perturbation], progress: bool, generator: torch.Generator
) -> Scores:
    """1 + K + (pairs of different layers or sites) forwards of the sample set. Nothing is drawn. Raises InvalidRequest
    where these are more than ``MOST_FORWARDS``. Around a base plan the matrix is left as measured.
    """
    pairs = [
        (k, m) for m, b in enumerate(perturbations) for k, a in enumerate(perturbations[:m]) if a.place != b.place
    ]
    _require_affordable(len(perturbations), len(pairs))
    reference = Reference.of(subject)
    here = reference.damage_of(subject.outputs())

    def increase(*chosen: Perturbation) -> RunningDamage:
        return reference.damage_of(subject.outputs(chosen)).since(here)

    def measure(m: int) -> Found:
        together = np.zeros(len(perturbations))
        for k in range(m):
            if perturbations[k].place != perturbations[m].place:
                together[k] = increase(perturbations[k], perturbations[m]).mean
        return {"alone": np.array(increase(perturbations[m]).mean_and_error), "together": together}

    alone, together = np.zeros((len(perturbations), 2)), np.zeros((len(perturbations), len(perturbations)))
    for m, found in by_place(subject, perturbations, "pairwise", progress, measure):
        alone[m], together[m] = found["alone"], found["together"]
    means, errors = alone.T.copy()
    matrix = np.diag(2 * means)
    for k, m in pairs:
        matrix[k, m] = matrix[m, k] = together[m, k] - means[k] - means[m]
    notes = notes_on(subject, reference.damage, here)
    if not subject.base:
        matrix, notes["projected_away"] = projected(matrix, 2 * means)
    return Scores(means, errors, matrix, notes)


def _require_affordable(count: int, pairs: int) -> None:
    forwards = 1 + count + pairs
    if forwards > MOST_FORWARDS:
        raise InvalidRequest(
            f"sensitivity='pairwise' needs {forwards:,} forwards of the calibration set for {count} formats of layers "
            f"and sites; at most {MOST_FORWARDS:,} are run. Pass fewer schemes, or choose 'gram', which estimates "
            f"the same terms with {count}."
        )


def projected(matrix: np.ndarray, diagonal: np.ndarray) -> tuple[np.ndarray, float]:
    """The nearest positive semi-definite matrix scaled to ``diagonal``, and what share of the eigenvalues' magnitude
    was negative.
    """
    if not matrix.size:
        return matrix, 0.0
    values, vectors = np.linalg.eigh(matrix)
    kept = (vectors * np.maximum(values, 0)) @ vectors.T
    now = np.diag(kept)
    scale = np.sqrt(np.divide(diagonal, now, out=np.zeros_like(now), where=now > 0))
    scaled = kept * np.outer(scale, scale)
    np.fill_diagonal(scaled, diagonal)
    total = np.abs(values).sum()
    return scaled, float(np.abs(values[values < 0]).sum() / total) if total else 0.0
