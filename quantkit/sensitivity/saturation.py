"""What whole plans, measured on the calibration inputs, say about pair terms: how strong they are, and where they end.

Pair terms are second order and estimated from single changes; where layers depend on each other strongly they are most
of a plan's damage, elsewhere they overshoot. A change that does much damage alone is beyond the reach of second order,
and its pair terms overshoot most. And a quadratic form knows no end, but outputs that are wrong already cannot become
wrong again: where most layers get two bits it overshoots several times. So a few seeded random plans, from narrow to
wide, are measured as a whole, and three numbers are fitted to them: pair terms are multiplied by a <= 1 and fade with
the damages d of their two changes alone, by 1 / sqrt((1 + t d_k) (1 + t d_l)); both keep the matrix positive
semi-definite. The damage of a plan is then q / (1 + s q) of the form q, which keeps the order of plans and leaves
small damages as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from quantkit.kernels.reference import QuantizedWeight
from quantkit.plan import saturated
from quantkit.progress import track
from quantkit.sensitivity.by_place import digest_changes, members_of
from quantkit.sensitivity.measure import Perturbation, Subject

MOST_PLANS = 24
FORMATS_PER_PLAN = 6  # a plan is measured for so many formats, which bounds what it adds to a profile
STEPS_PER_DECADE = 16
STRENGTHS = tuple((np.arange(20, -1, -1) / 20).tolist())  # of pair terms, the strongest first
FADINGS = (0.0, *np.logspace(-1, 3, 13).tolist())  # over the largest damage alone, the slowest first


def plans_measured(formats: int) -> int:
    """How many whole plans a profile of so many formats measures."""
    return min(MOST_PLANS, formats // FORMATS_PER_PLAN)


def random_plans(perturbations: Sequence[Perturbation], count: int, generator: torch.Generator) -> list[list[int]]:
    """Positions of one perturbation for every layer and site, ``count`` times. Each plan draws from a window of bit
    widths; windows begin at every width in turn, so that some plans are narrow throughout.
    """
    members = members_of(perturbations)
    found = []
    for number in range(count):
        windows = [_window(perturbations, at_sites, number, generator) for at_sites in (False, True)]
        plan = []
        for (_, at_sites), options in members.items():
            low, high = windows[at_sites]
            inside = [k for k in options if low <= bits_of(perturbations[k]) <= high] or options
            plan.append(inside[int(torch.randint(len(inside), (1,), generator=generator))])
        found.append(plan)
    return found


def _window(
    perturbations: Sequence[Perturbation], at_sites: bool, number: int, generator: torch.Generator
) -> tuple[int, int]:
    widths = sorted({bits_of(p) for p in perturbations if p.place[1] is at_sites})
    if len(widths) < 2:
        return 0, 1 << 30
    low = number % (len(widths) - 1)
    return widths[low], widths[int(torch.randint(low + 1, len(widths), (1,), generator=generator))]


def bits_of(one: Perturbation) -> int:
    """The width of a perturbation's codes."""
    return one.change.format.bits if isinstance(one.change, QuantizedWeight) else one.change.bits


def measured_plans(
    subject: Subject,
    perturbations: Sequence[Perturbation],
    plans: Sequence[Sequence[int]],
    damage_of: Callable[[Sequence[Perturbation]], float],
    progress: bool,
) -> np.ndarray:
    """Damage of each plan as a whole; those that the subject's artefacts have are not measured again."""
    found = np.zeros(len(plans))
    for number, plan in enumerate(track(plans, "measuring whole plans", enabled=progress)):
        chosen = [perturbations[k] for k in plan]
        name, key = f"whole plan {number}", digest_changes(chosen)
        kept = subject.artefacts.find(name, key)
        found[number] = damage_of(chosen) if kept is None else float(kept[0]["damage"])
        if kept is None:
            subject.artefacts.keep(name, key, {"damage": found[number]})
    return found


@dataclass(frozen=True)
class Fit:
    """``strength`` of pair terms (at most 1), their ``fading`` (one over a damage) and the ``limit`` of whole plans
    (one over the largest damage a plan can do; 0: no end).
    """

    strength: float = 1.0
    fading: float = 0.0
    limit: float = 0.0

    def weakened(self, damage: np.ndarray, gram: np.ndarray) -> np.ndarray:
        """``gram`` (K, K), whose diagonal is twice the ``damage`` (K) alone, with its pair terms weakened."""
        reach = 1 / np.sqrt(1 + self.fading * damage.clip(min=0))
        weak = self.strength * gram * np.outer(reach, reach)
        np.fill_diagonal(weak, np.diag(gram))
        return weak


def fitted(damage: np.ndarray, gram: np.ndarray, plans: Sequence[Sequence[int]], measured: np.ndarray) -> Fit:
    """The fit with which ``gram`` (K, K) predicts the ``measured`` damages of plans best, by the mean absolute
    logarithm of the ratio; all of the pair terms where there is nothing to fit to.
    """
    chosen = np.zeros((len(plans), len(damage)))
    for row, plan in zip(chosen, plans, strict=True):
        row[list(plan)] = 1
    alone = chosen @ damage
    best, least = Fit(), np.inf
    for fading in FADINGS if damage.size and damage.max() > 0 else ():
        fading = fading / float(damage.max())
        off = Fit(fading=fading).weakened(damage, gram)
        np.fill_diagonal(off, 0)
        pairs = 0.5 * ((chosen @ off) * chosen).sum(1)
        strength, limit, miss = _nearest(alone, pairs, measured)
        if miss < least:
            best, least = Fit(strength, fading, limit), miss
    return best


def _nearest(alone: np.ndarray, pairs: np.ndarray, measured: np.ndarray) -> tuple[float, float, float]:
    """Strength and limit that come nearest for these sums of single damages and of pair terms, and how near."""
    usable = (alone > 0) & (alone + pairs > 0) & (measured > 0)
    if not usable.any():
        return 1.0, 0.0, np.inf
    single, together, truth = alone[usable], pairs[usable], measured[usable]
    limits = [0.0, *(np.logspace(-3, 3, 6 * STEPS_PER_DECADE + 1) / single.max()).tolist()]
    options = [(a, s) for a in STRENGTHS for s in limits]
    predicted = np.log([saturated(single + a * together, s) for a, s in options])
    misses = np.abs(predicted - np.log(truth)).mean(1)
    found = int(misses.argmin())
    return *options[found], float(misses[found])
