"""Damage of every format alone and of every pair, from the same forwards: the Gauss-Newton Gram matrix.

Quantize one layer (or site) and record the shift u of the outputs. The inner products of these shifts, in the metric
of the damage, are the Gauss-Newton estimate of every second-order term d_i^T H d_j, at the cost of the forwards that
single damages need anyway ("Augmenting Hessians with Inter-Layer Dependencies", Schaefer et al., arXiv 2306.04879; the
Gram form: docs/methods/gram.md). Only their cosines C are used (``pair_terms``); lengths come from the measured
damage: G = D C D with D_k = sqrt(2 damage_k), positive semi-definite, and half the sum of G over a plan predicts its
damage, after ``saturation`` has weakened and bent it. Around a base plan, where damage may fall, the lengths are those
of the shifts in the metric at the base, and G is left as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from quantkit.sensitivity.by_place import Found, by_place
from quantkit.sensitivity.damage import Reference, RunningDamage, notes_on
from quantkit.sensitivity.measure import Perturbation, Scores, Subject
from quantkit.sensitivity.outputs import Outputs, joined
from quantkit.sensitivity.pair_terms import Shifts, metric_lengths, pair_terms
from quantkit.sensitivity.registry import Cost, estimator
from quantkit.sensitivity.saturation import calibrated, plans_measured
from quantkit.sensitivity.sketch import Sketches


@estimator("gram", Cost(lambda work: work.formats + 1 + plans_measured(work.formats), keeps_shifts=True))
def gram(
    subject: Subject,
    perturbations: Sequence[Perturbation],
    progress: bool = True,
    generator: torch.Generator | None = None,
) -> Scores:
    """Measure all perturbations, and a few whole plans: K forwards of the sample set and at most a sixth more, memory
    K x (output rows x classes) float32, or ``sketch.SHIFT_BYTES`` where that is less: larger outputs are sketched,
    with seed 0 where no ``generator`` is given, and the notes say how far that falsifies single damages.
    """
    reference = Reference.of(subject)
    outputs = list(subject.outputs()) if subject.base else reference.outputs
    before = reference.damage_of(outputs)
    draw = generator or torch.Generator().manual_seed(0)
    sketches = Sketches.of(reference, len(perturbations), draw)
    here = joined([sketches(i, one) for i, one in enumerate(outputs)])
    shifts = [torch.empty(len(perturbations), *rows.shape, dtype=torch.float32, device="cpu") for rows in here]
    means, errors = np.zeros(len(perturbations)), np.zeros(len(perturbations))

    def measure(k: int) -> Found:
        damage, kept = _measure(subject, perturbations[k], reference, sketches)
        found = {f"output {o}": rows.numpy() for o, rows in enumerate(kept)}
        return {"found": np.array(damage.since(before).mean_and_error)} | found

    for k, found in by_place(subject, perturbations, "gram", progress, measure):
        means[k], errors[k] = found["found"]
        for o, rows in enumerate(here):
            torch.sub(torch.from_numpy(found[f"output {o}"]), rows, out=shifts[o][k])
    every = zip(reference.damage.measures, here, shifts, sketches.of_kept(reference.samples()), strict=True)
    moved = [Shifts(*one) for one in every]
    pairs = pair_terms(moved, [p.owner for p in perturbations])
    lengths = np.sqrt(2 * means) if not subject.base else metric_lengths(moved)
    matrix = pairs.cosines * np.outer(lengths, lengths)
    np.fill_diagonal(matrix, 2 * means)
    notes = notes_on(subject, reference.damage, before)
    notes |= {"temperature": pairs.temperature, "reliability": pairs.reliability}
    if sketches.share is not None:
        floats = joined([sketches(i, one) for i, one in enumerate(reference.outputs)])
        notes["sketch"] = _sketch_error(floats, moved, means) | {"rows": sketches.share}
    scores = Scores(means, errors, matrix, notes)
    if subject.base:
        return scores
    return calibrated(scores, subject, perturbations, plans_measured(len(perturbations)), progress, reference)


def _measure(
    subject: Subject, one: Perturbation, reference: Reference, sketches: Sketches
) -> tuple[RunningDamage, Outputs]:
    """The damage, and the outputs, each (rows, classes), sketched or not."""
    running, kept = RunningDamage(reference.damage), []
    for i, (before, after) in enumerate(zip(reference.outputs, subject.outputs([one]), strict=True)):
        running.update(before, after)
        kept.append(sketches(i, after))
    return running, joined(kept)


def _sketch_error(reference: Outputs, moved: Sequence[Shifts], full: np.ndarray) -> dict[str, float]:
    """How many classes are left, and the median relative error of single damages measured on what was kept."""

    def damage(*shifts: Tensor | float) -> float:
        parts = zip(moved, reference, shifts, strict=True)
        return sum(float(one.damage.rows(rows, one.here + shift).double().mean()) for one, rows, shift in parts)

    before = damage(*[0.0] * len(moved))
    kept = np.array([damage(*shifts) - before for shifts in zip(*(one.shifts for one in moved), strict=True)])
    changed = full != 0
    error = np.abs(kept - full)[changed] / np.abs(full[changed])
    classes = max(one.here.shape[1] for one in moved)
    return {"classes": float(classes), "relative_error": float(np.median(error)) if changed.any() else 0.0}
