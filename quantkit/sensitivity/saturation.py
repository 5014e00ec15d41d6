"""What whole plans, measured on the calibration inputs, say about pair terms: how strong they are, and where they end.

Pair terms are second order and estimated from single changes; where layers depend on each other strongly they are most
of a plan's damage, elsewhere they overshoot. A change that does much damage alone is beyond the reach of second order,
and its pair terms overshoot most. And a quadratic form knows no end, but outputs that are wrong already cannot become
wrong again; on the way there damage can grow faster than quadratically. So some seeded random plans, from narrow to
wide, are measured as a whole. Pair terms are multiplied by a <= 1 and fade with the damages d of their two changes
alone, by 1 / sqrt((1 + t d_k) (1 + t d_l)), and the quadratic form q of a plan is bent to h / (1 + s h),
h = q (1 + g q), which keeps the order of plans and leaves small damages as they are.

A few dozen plans cannot tell strong fading terms from weak lasting ones, and the nearest of such fits orders plans
badly. So pair terms are averaged over all fits, each weighted by how likely it makes what was measured: with errors of
the logarithm that are Laplace distributed and of unknown scale, whose prior is flat in its logarithm, that is their
mean to the power of minus the number of plans. Growth is as likely as none before anything is measured. The average is
positive semi-definite, as every fit is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import numpy as np
import torch

from quantkit.plan import saturated
from quantkit.progress import track
from quantkit.sensitivity.by_place import digest_changes, members_of
from quantkit.sensitivity.damage import Reference
from quantkit.sensitivity.measure import Perturbation, Scores, Subject
from quantkit.store import Codec

MOST_PLANS = 40
LEAST_PLANS = 4  # fewer are met by a bend that is far off everywhere else
FORMATS_PER_PLAN = 4  # a plan is measured for so many formats, which bounds what it adds to a profile
STRENGTHS = tuple((np.arange(20, -1, -1) / 20).tolist())  # of pair terms
LIMITS = (0.0, *np.logspace(-3, 3, 97).tolist())  # over the largest sum of single damages, as are growths
GROWTHS = (0.0, *np.logspace(-2, 3, 16).tolist())
LEAST_MISS = 0.01  # nearer than this is chance
FADINGS = (0.0, *np.logspace(-1, 3, 13).tolist())  # over the largest damage alone


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
            inside = [k for k in options if low <= perturbations[k].change.bits <= high] or options
            plan.append(inside[int(torch.randint(len(inside), (1,), generator=generator, device="cpu"))])
        found.append(plan)
    return found


def _window(
    perturbations: Sequence[Perturbation], at_sites: bool, number: int, generator: torch.Generator
) -> tuple[int, int]:
    widths = sorted({p.change.bits for p in perturbations if p.at_site is at_sites})
    if len(widths) < 2:
        return 0, 1 << 30
    low = number % (len(widths) - 1)
    return widths[low], widths[int(torch.randint(low + 1, len(widths), (1,), generator=generator, device="cpu"))]


DAMAGE: Codec[float] = Codec(
    lambda damage: ({"damage": np.asarray(damage)}, ""), lambda arrays, note: float(arrays["damage"])
)


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
        found[number] = subject.artefacts.cached(name, key, partial(damage_of, chosen), DAMAGE)
    return found


@dataclass(frozen=True)
class Fit:
    """``strengths`` of pair terms, which sum to at most 1, each with its ``fadings`` (one over a damage), the
    ``limit`` of whole plans (one over the largest damage a plan can do; 0: no end) and their ``growth`` (one over a
    damage).
    """

    strengths: tuple[float, ...] = (1.0,)
    fadings: tuple[float, ...] = (0.0,)
    limit: float = 0.0
    growth: float = 0.0

    def weakened(self, damage: np.ndarray, gram: np.ndarray) -> np.ndarray:
        """``gram`` (K, K), whose diagonal is twice the ``damage`` (K) alone, with its pair terms weakened."""
        share = np.zeros_like(gram)
        for strength, fading in zip(self.strengths, self.fadings, strict=True):
            reach = 1 / np.sqrt(1 + fading * damage.clip(min=0))
            share += strength * np.outer(reach, reach)
        weak = share * gram
        np.fill_diagonal(weak, np.diag(gram))
        return weak


def fitted(damage: np.ndarray, gram: np.ndarray, plans: Sequence[Sequence[int]], measured: np.ndarray) -> Fit:
    """The average of all fits of ``gram`` (K, K) to the ``measured`` damages of plans, and the limit and growth that
    come nearest to them then; all of the pair terms, and no bend, where there is too little to fit to.
    """
    chosen = np.zeros((len(plans), len(damage)))
    for row, plan in zip(chosen, plans, strict=True):
        row[list(plan)] = 1
    alone = chosen @ damage
    usable = (alone > 0) & (measured > 0)
    if usable.sum() < LEAST_PLANS:
        return Fit()
    chosen, alone, truth = chosen[usable], alone[usable], measured[usable]
    fadings = tuple(fading / float(damage.max()) for fading in FADINGS)
    pairs = np.stack([_pair_sums(Fit(fadings=(fading,)).weakened(damage, gram), chosen) for fading in fadings])
    bends = np.array(list(product(GROWTHS, LIMITS))) / alone.max()
    misses = np.stack([[_misses(alone + a * together, bends, truth) for a in STRENGTHS] for together in pairs])
    grows = bends[:, 0] > 0
    odds = (misses.min() / misses) ** len(truth) * np.where(grows, 1 / (len(GROWTHS) - 1), 1)
    shares = (odds.sum(2) / odds.sum()) @ np.array(STRENGTHS)
    likely = bends if odds[..., grows].sum() > odds[..., ~grows].sum() else bends[~grows]
    growth, limit = likely[_misses(alone + shares @ pairs, likely, truth).argmin()]
    return Fit(tuple(shares.tolist()), fadings, float(limit), float(growth))


def _pair_sums(gram: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """What pair terms add to each of the plans (plans, K)."""
    return 0.5 * (((chosen @ gram) * chosen).sum(1) - chosen @ np.diag(gram))


def _misses(quadratic: np.ndarray, bends: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """For each (growth, limit) the mean absolute logarithm of the ratio of predicted to ``measured`` damages."""
    bent = saturated(quadratic.clip(min=np.finfo(float).tiny), bends[:, 1:], bends[:, :1])
    return np.abs(np.log(bent / measured)).mean(1).clip(min=LEAST_MISS)


def calibrated(
    scores: Scores,
    subject: Subject,
    perturbations: Sequence[Perturbation],
    count: int,
    progress: bool,
    reference: Reference | None = None,
) -> Scores:
    """Scores with pair terms as strong as they show themselves, and an end to damage, from ``count`` whole plans
    measured on the subject's inputs. Always the same plans: what they are has nothing to do with the draws of the
    inputs.
    """
    assert scores.gram is not None, "of an estimator of pair terms"
    plans = random_plans(perturbations, count, torch.Generator().manual_seed(0))
    known = reference or Reference.of(subject)

    def damage_of(chosen: Sequence[Perturbation]) -> float:
        return known.damage_of(subject.outputs(chosen)).mean

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
