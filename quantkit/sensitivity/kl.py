"""Damage of every format alone, measured: what most tools add up. No pair terms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from quantkit.progress import track
from quantkit.sensitivity.measure import (
    Perturbation,
    Scores,
    Subject,
    damage_for,
    damage_rows,
    mean_and_error,
    notes_on,
)
from quantkit.sensitivity.registry import estimator


@estimator("kl")
def kl(subject: Subject, perturbations: Sequence[Perturbation], progress: bool, generator: torch.Generator) -> Scores:
    """Measure all perturbations: K forwards of the sample set, one perturbation in memory. Nothing is drawn."""
    reference = list(subject.float_outputs())
    damage = damage_for(subject.loss, torch.cat(reference))
    here = damage_rows(damage, reference, subject.outputs())
    found = []
    for one in track(perturbations, "measuring formats", enabled=progress):
        found.append(mean_and_error(damage_rows(damage, reference, subject.outputs([one])) - here))
    means, errors = np.array(found).reshape(-1, 2).T.copy()
    return Scores(means, errors, notes=notes_on(subject, damage, here))
