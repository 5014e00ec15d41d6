"""Damage of every format alone, measured: what most tools add up. No pair terms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from quantkit.sensitivity.by_place import Found, by_place
from quantkit.sensitivity.damage import Reference, notes_on
from quantkit.sensitivity.measure import Perturbation, Scores, Subject
from quantkit.sensitivity.registry import Cost, estimator


@estimator("kl", Cost(lambda work: work.formats + 1))
def kl(subject: Subject, perturbations: Sequence[Perturbation], progress: bool, generator: torch.Generator) -> Scores:
    """Measure all perturbations: K forwards of the sample set, one perturbation in memory. Nothing is drawn."""
    reference = Reference.of(subject)
    here = reference.damage_of(subject.outputs())

    def measure(k: int) -> Found:
        increase = reference.damage_of(subject.outputs([perturbations[k]])).since(here)
        return {"found": np.array(increase.mean_and_error)}

    found = np.zeros((len(perturbations), 2))
    for k, one in by_place(subject, perturbations, "kl", progress, measure):
        found[k] = one["found"]
    means, errors = found.T.copy()
    return Scores(means, errors, notes=notes_on(subject, reference.damage, here))
