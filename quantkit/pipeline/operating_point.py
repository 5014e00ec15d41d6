"""Effort after the profile: a plan improved by measuring around it, on the inputs the profile was measured on."""

from __future__ import annotations

from dataclasses import replace

from quantkit.allocation.allocate import plan_of, question_around, recount
from quantkit.allocation.from_profile import assignment_of
from quantkit.allocation.operating_point import improve
from quantkit.budget import Budget
from quantkit.pipeline.profile import Bench
from quantkit.plan import Plan, Profile
from quantkit.progress import notice
from quantkit.sensitivity.around import PlanDamage
from quantkit.sensitivity.measure import SOFTENED

# Measurements (forwards of the sample set with a whole plan in place) allowed per profiled format.
EFFORTS = {"fast": 0.0, "balanced": 1.5, "thorough": 3.0}


def refine(plan: Plan, profile: Profile, budget: Budget, bench: Bench, effort: str, seed: int, progress: bool) -> Plan:
    """The plan that ``effort`` finds from ``plan``, never one that measures worse; what it took is in its
    provenance.

    Compared by the damage of softened outputs: on the inputs that decide, the damage itself is that of the few on
    which the network hesitates, and says less of other inputs.
    """
    limits = budget.limits(profile)
    asked = question_around(profile, limits, plan)
    start = assignment_of(profile, asked, plan)
    measurements = PlanDamage(bench.subject, bench.perturbations, progress, SOFTENED)
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
