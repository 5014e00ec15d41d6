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
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from quantkit.program.inputs import batch_size
from quantkit.sensitivity.by_place import Found, by_place
from quantkit.sensitivity.measure import (
    Damage,
    KLDamage,
    Perturbation,
    Scores,
    Subject,
    damage_for,
    damage_rows,
    mean_and_error,
    notes_on,
)
from quantkit.sensitivity.pair_terms import metric_lengths, pair_terms, sample_numbers
from quantkit.sensitivity.registry import Cost, estimator
from quantkit.sensitivity.saturation import fitted, measured_plans, plans_measured, random_plans
from quantkit.sensitivity.sketch import Sketch, sketch_for


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
    reference = list(subject.float_outputs())
    outputs = list(subject.outputs()) if subject.base else reference
    damage = damage_for(subject.loss, torch.cat(reference))
    before = damage_rows(damage, reference, outputs)
    draw = generator or torch.Generator().manual_seed(0)
    sketch = sketch_for(reference, len(perturbations), isinstance(damage, KLDamage), draw)
    small = outputs if sketch is None else [sketch(i, o) for i, o in enumerate(outputs)]
    here = torch.cat(small)
    shifts = torch.empty(len(perturbations), *here.shape)
    means, errors = np.zeros(len(perturbations)), np.zeros(len(perturbations))

    def measure(k: int) -> Found:
        rows, kept = _measure(subject, perturbations[k], reference, damage, sketch)
        return {"found": np.array(mean_and_error(rows - before)), "outputs": kept.numpy()}

    for k, found in by_place(subject, perturbations, "gram", progress, measure):
        means[k], errors[k] = found["found"]
        torch.sub(torch.from_numpy(found["outputs"]), here, out=shifts[k])
    samples = sample_numbers([len(o) for o in outputs], [batch_size(b) for b in subject.batches])
    samples = samples if sketch is None else sketch.of_kept(samples)
    pairs = pair_terms(damage, here, shifts, [p.owner for p in perturbations], samples)
    lengths = np.sqrt(2 * means) if not subject.base else metric_lengths(damage, here, shifts)
    matrix = pairs.cosines * np.outer(lengths, lengths)
    np.fill_diagonal(matrix, 2 * means)
    notes = notes_on(subject, damage, before)
    notes |= {"temperature": pairs.temperature, "reliability": pairs.reliability}
    if sketch is not None:
        float_outputs = torch.cat([sketch(i, r) for i, r in enumerate(reference)])
        notes["sketch"] = _sketch_error(damage, float_outputs, here, shifts, means) | {"rows": sketch.share}
    scores = Scores(means, errors, matrix, notes)
    return scores if subject.base else _with_saturation(scores, subject, perturbations, damage, reference, progress)


def _with_saturation(
    scores: Scores,
    subject: Subject,
    perturbations: Sequence[Perturbation],
    damage: Damage,
    reference: Sequence[Tensor],
    progress: bool,
) -> Scores:
    """Scores with pair terms as strong as they show themselves, and an end to damage, from whole plans measured on the
    subject's inputs. Always the same plans: what they are has nothing to do with the draws of the inputs.
    """
    assert scores.gram is not None, "made by the Gram estimator"
    plans = random_plans(perturbations, plans_measured(len(perturbations)), torch.Generator().manual_seed(0))

    def damage_of(chosen: Sequence[Perturbation]) -> float:
        return float(damage_rows(damage, reference, subject.outputs(chosen)).mean())

    measured = measured_plans(subject, perturbations, plans, damage_of, progress)
    fit = fitted(scores.damage, scores.gram, plans, measured)
    found = replace(scores, gram=fit.weakened(scores.damage, scores.gram), saturation=fit.limit, growth=fit.growth)
    errors = [abs(found.predict(plan) / truth - 1) for plan, truth in zip(plans, measured, strict=True) if truth > 0]
    notes = dict(scores.notes) | {"whole_plans": len(plans)}
    notes |= {
        "pair_strength": sum(fit.strengths),
        "pair_terms": [[a, t] for a, t in zip(fit.strengths, fit.fadings, strict=True)],
    }
    if errors:
        notes["whole_plan_error"] = float(np.median(errors))
    return replace(found, notes=notes)


def _measure(
    subject: Subject, one: Perturbation, reference: Sequence[Tensor], damage: Damage, sketch: Sketch | None
) -> tuple[Tensor, Tensor]:
    """Damage per row (float64), and the outputs (rows, classes), sketched or not."""
    losses, kept = [], []
    for i, (before, after) in enumerate(zip(reference, subject.outputs([one]), strict=True)):
        losses.append(damage.rows(before, after).double())
        kept.append(after if sketch is None else sketch(i, after))
    return torch.cat(losses), torch.cat(kept)


def _sketch_error(
    damage: Damage, reference: Tensor, here: Tensor, shifts: Tensor, full: np.ndarray
) -> dict[str, float]:
    """How many classes are left, and the median relative error of single damages measured on what was kept."""
    before = damage.rows(reference, here).double().mean()
    kept = np.array([float(damage.rows(reference, here + s).double().mean() - before) for s in shifts])
    moved = full != 0
    error = np.abs(kept - full)[moved] / np.abs(full[moved])
    return {"classes": float(here.shape[1]), "relative_error": float(np.median(error)) if moved.any() else 0.0}
