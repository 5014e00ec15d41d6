"""The plan of a request that leaves nothing to choose: one scheme for every layer, and no damage to weigh it by."""

from __future__ import annotations

from dataclasses import replace

from quantkit.allocation.allocate import allocate
from quantkit.allocation.execution_problem import needs_execution
from quantkit.allocation.from_profile import candidates
from quantkit.allocation.reasons import reasons_without_choice
from quantkit.budget import Budget
from quantkit.errors import InvalidRequest
from quantkit.plan import COMPOSITION, FLOAT_STORAGE, TRANSFORMS, Plan, Profile

KEPT = (
    "limits",
    "target",
    "first_last",
    FLOAT_STORAGE,
    TRANSFORMS,
    COMPOSITION,
)  # of what the provenance of a choice says


def only_plan(profile: Profile, budget: Budget) -> Plan | None:
    """The one plan that the candidates of a ``profile``, measured or not, allow; None where there are several.

    A limit on accuracy is left to whoever can evaluate. Raises InfeasibleBudget where the plan is over another limit,
    and InvalidRequest where the budget is a scheme and a rule offers a layer several others.
    """
    offered = candidates(profile)
    several = {name: options for name, options in offered.items() if len(options) > 1}
    if several and budget.scheme is not None:
        name, options = next(iter(several.items()))
        raise InvalidRequest(
            f"The rules offer layer {name!r} {' or '.join(map(str, options))}, and with {budget.scheme} for "
            "everything nothing is measured that could tell which. Give it one scheme, or ask for a budget such as "
            "'4 bits'."
        )
    first = next(scheme for options in offered.values() for scheme in options if not scheme.is_float)
    certain = budget.without_accuracy() or Budget(scheme=first)
    if several or needs_execution(certain.limits(profile)):
        return None
    plan = allocate(profile, certain)
    kept = {key: plan.provenance[key] for key in KEPT if key in plan.provenance}
    return replace(
        plan,
        predicted_damage=None,
        why=reasons_without_choice(profile, plan.schemes),
        provenance={"budget": str(budget)} | kept | {"solver": "none: every layer has one candidate"},
    )
