"""What plans of a profile really do, measured on the inputs that the profile was measured on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from quantkit.errors import InvalidRequest
from quantkit.plan import Plan, Profile
from quantkit.sensitivity.around import PlanDamage
from quantkit.stages.options import Run
from quantkit.stages.outliers import transformed
from quantkit.stages.profile import evaluator_of
from quantkit.stages.request import make_ready


def measured_damages(
    profile: Profile,
    plans: Sequence[Plan],
    model: nn.Module,
    calibration: Any,
    *,
    progress: bool = True,
    **settings: Any,
) -> list[float]:
    """Damage of each plan, in the codes the profile was measured with: a forward of the sample set each, after
    rounding all formats once more.

    ``model``, ``calibration`` and ``settings`` are those of ``quantkit.profile``; raises InvalidRequest where they are
    not what made ``profile``.
    """
    request = transformed(make_ready(model, calibration, **settings), settings.get("transforms", "auto"))
    changed = [name for name, value in request.settings.items() if profile.provenance.get(name) != value]
    if changed:
        raise InvalidRequest(
            f"The profile was not measured by this request: {', '.join(changed)} differ. Profile again, or measure "
            "with the recipe the profile came from."
        )
    evaluator = evaluator_of(request, Run(progress))
    damage = PlanDamage(evaluator.subject, evaluator.perturbations, progress)
    return damage.plans([profile.chosen(plan.schemes, plan.sites) for plan in plans])
