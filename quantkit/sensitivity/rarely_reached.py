"""Layers that hardly any input reaches, as experts in a mixture: their measured damage says nothing.

A layer that fewer inputs reach than ``FEW`` gets the damage of a typical layer whose weight is as wrong: the squared
error of its weight, relative to its square, times what such an error costs elsewhere in the same format (the median of
damage per error over the layers that were measured). No data of its own is used, and no pair terms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from quantkit.program.layers import Weights
from quantkit.progress import warn
from quantkit.sensitivity.measure import Perturbation, Scores

FEW = 32


def reached_by_few(rows: Mapping[str, int], samples: int) -> dict[str, int]:
    """The layers with fewer than ``FEW`` inputs (or fewer than there are samples), and how many these are."""
    return {name: count for name, count in rows.items() if count < min(FEW, samples)}


def with_fallback(
    scores: Scores, perturbations: Sequence[Perturbation], floats: Weights, few: Mapping[str, int]
) -> Scores:
    """Scores with the damage of the layers ``few`` (name -> inputs) replaced, and a warning and a note that name
    them.
    """
    if not few:
        return scores
    guessed = np.array([p.owner in few and not p.place[1] for p in perturbations])
    error = np.array([_relative_error(floats, p) for p in perturbations])
    damage, spread = scores.damage.copy(), scores.standard_error.copy()
    for k in np.flatnonzero(guessed).tolist():
        like = _alike(perturbations, k, (error > 0) & ~guessed)
        if like.any():
            per_error = scores.damage[like] / error[like]
            damage[k], spread[k] = np.median(per_error) * error[k], per_error.std() * error[k]
    matrix = None if scores.gram is None else scores.gram.copy()
    if matrix is not None:
        matrix[guessed] = matrix[:, guessed] = 0
        matrix[guessed, guessed] = 2 * damage[guessed]
    listed = ", ".join(f"{name} ({count})" for name, count in few.items())
    warn(
        f"too few calibration inputs reach {listed}: the damage of these layers is guessed from their weights. Add "
        "inputs that reach them, or keep them at a wide format by a rule."
    )
    notes = dict(scores.notes) | {"guessed_from_weights": dict(few)}
    return replace(scores, damage=damage, standard_error=spread, gram=matrix, notes=notes)


def _alike(perturbations: Sequence[Perturbation], k: int, known: np.ndarray) -> np.ndarray:
    """Which of the ``known`` perturbations have the format of number ``k``; all of them where none has."""
    same = known & np.array([p.format == perturbations[k].format for p in perturbations])
    return same if same.any() else known


def _relative_error(floats: Weights, one: Perturbation) -> float:
    """Squared error of a weight over its square; 0 for sites."""
    if not one.change.stored:
        return 0.0
    weight = floats[one.owner].detach().double()
    return float((one.change.dequantize().to(weight) - weight).square().sum() / weight.square().sum().clamp(min=1e-30))
