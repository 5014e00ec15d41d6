"""Effort after the profile: a plan improved by measuring around it.

Compared by the damage of softened outputs: on the inputs that decide, the damage itself is that of the few on which
the network hesitates, and says less of other inputs. But it is what counts in the end: a plan with more of it is not
taken. Measured on the inputs of the profile; images are also mirrored and shifted, where the float network hardly
minds, as searching finds what is good for these very inputs, which the network may have been trained on. What that
gains on other inputs, and where it does not, is in docs/results/allocation.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from quantkit.allocation.allocate import plan_of, problem_around, recount
from quantkit.allocation.from_profile import assignment_of
from quantkit.allocation.operating_point import improve
from quantkit.budget import Budget
from quantkit.plan import Plan, Profile
from quantkit.program.inputs import Batch
from quantkit.progress import notice
from quantkit.reconstruction.augmentation import changed, harmless
from quantkit.sensitivity.around import PlanDamage
from quantkit.sensitivity.damage import SOFTENED, Reference
from quantkit.sensitivity.inputs import mixed_pairs
from quantkit.sensitivity.measure import Subject
from quantkit.sensitivity.outputs import Outputs
from quantkit.stages.profile import Evaluator

# Measurements (forwards of the sample set with a whole plan in place) allowed per profiled format.
EFFORTS = {"fast": 0.0, "balanced": 1.5, "thorough": 3.0}
JUDGES = (SOFTENED, 1.0)  # temperatures: the first decides, and the damage itself must not object
DRAWS = 4  # of the inputs, where it takes so many to tell whether a plan is better


def refine(plan: Plan, profile: Profile, budget: Budget, evaluator: Evaluator, effort: str, progress: bool) -> Plan:
    """The plan that ``effort`` finds from ``plan``, never one that measures worse; what it took is in its
    provenance.
    """
    limits, seed = budget.limits(profile), int(profile.provenance["seed"])
    asked = problem_around(profile, limits, plan)
    start = assignment_of(profile, asked, plan)
    measurements = draws_of(evaluator, seed, progress)
    allowed = EFFORTS[effort] * len(profile.entries)
    found, ledger = improve(profile, asked, start, measurements, allowed, seed)
    better = plan_of(profile, asked, found)
    recount(better, profile, limits)
    damages = [step["damage"] for step in ledger.steps if step["accepted"]]
    if damages:
        notice(
            f"{effort} effort: softened damage {damages[0]:.4g} -> {damages[-1]:.4g}, {ledger.spent:.0f} measurements"
        )
    spent = {"effort": effort, "measurements": ledger.spent, "steps": ledger.steps}
    return replace(better, provenance=plan.provenance | {"operating_point": spent})


@dataclass(frozen=True)
class Draws:
    """Measured on one draw of the inputs after the other, each with other mixes and other changes."""

    evaluator: Evaluator
    seed: int
    progress: bool
    first: PlanDamage
    draws: int

    def rows(self, many: Sequence[Sequence[int]], share: float = 1.0, draw: int = 0) -> list[np.ndarray]:
        own = self.first if draw == 0 else measurements_of(self.evaluator, self.seed + draw, self.progress)
        return own.rows_at(JUDGES, many, share)

    def around(self, entries: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        return self.first.around(entries)


def draws_of(evaluator: Evaluator, seed: int, progress: bool) -> Draws:
    """The draws of an evaluator: one where inputs can neither be mixed nor changed, as all draws would be the same."""
    first = measurements_of(evaluator, seed, progress)
    notice("comparing plans on inputs that are mixed, and images mirrored and shifted, as far as they can be")
    return Draws(evaluator, seed, progress, first, 1 if first.subject.batches is evaluator.batches else DRAWS)


def measurements_of(evaluator: Evaluator, seed: int, progress: bool) -> PlanDamage:
    """What plans are compared by, on one draw of the inputs: pair-mixed and changed as far as they can be."""
    mixed = mixed_pairs(evaluator.batches, torch.Generator().manual_seed(seed))
    subject = replace(evaluator.subject, batches=evaluator.batches if mixed is None else mixed)
    inputs = _with_changed_images(subject, torch.Generator().manual_seed(seed))
    return PlanDamage(inputs, evaluator.perturbations, progress, SOFTENED)


def _with_changed_images(subject: Subject, generator: torch.Generator) -> Subject:
    """Measured on the same inputs with their images changed in the ways that the first batch says are harmless."""

    def outputs(batch: Batch) -> Outputs:
        return next(replace(subject, batches=[batch]).float_outputs())

    first = Reference.of(replace(subject, batches=subject.batches[:1]))
    changes = harmless(subject.batches[0], outputs, first.damage.mean, generator)
    if not changes:
        return subject
    return replace(subject, batches=[changed(batch, changes, generator) for batch in subject.batches])
