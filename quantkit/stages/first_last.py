"""What becomes of a network's first and last layers, which rounding hurts most: a policy that the plan spells out."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from quantkit.errors import InvalidRequest
from quantkit.formats import Scheme, WeightFormat
from quantkit.program.ends import first_layers, last_layers
from quantkit.program.program import Program
from quantkit.progress import notice
from quantkit.targets.rules import Rules, Wanted, decided_by_rule, rule_pairs
from quantkit.transforms.prepare import Prepared

SAME, EIGHT_BITS = "same", "8 bits"
FIRST_LAST = (SAME, EIGHT_BITS)


def ends_of(program: Program) -> dict[str, list[str]]:
    """The first and the last layers, nothing where the model was not traced."""
    return {"first": first_layers(program), "last": last_layers(program)} if program.steps else {}


def with_policy(
    policy: str, ready: Prepared, wanted: Sequence[Scheme], rules: Rules | None
) -> list[tuple[str, Wanted]]:
    """The user's rules, which win, after those that a policy comes to: 8 bits for weights and inputs of the first and
    the last layers. What else reads one of their inputs reads it at 8 bits too.
    """
    asked = rule_pairs(rules)
    quantized = [scheme for scheme in wanted if not scheme.is_float]
    if policy == SAME or not quantized:
        return asked
    if not ready.program.steps:
        raise InvalidRequest(
            f"first_last={policy!r} has to know which layers come first and last: pass calibration or example_inputs, "
            "or name the layers in rules."
        )
    ends = {name for names in ends_of(ready.program).values() for name in names} & set(ready.quantizable)
    ends = {name for name in ends if not decided_by_rule(name, asked, ready.layers)}
    widest = max(quantized, key=lambda scheme: scheme.activation.bits if scheme.activation else 0).activation
    eight = None if widest is None else replace(widest, fmt="8")
    shared = [] if eight is None or eight.dynamic else [site for site in ready.sites if ends & set(site.consumers)]
    beside = {reader for site in shared for reader in site.consumers} - ends
    own: list[tuple[str, Wanted]] = [(glob.escape(name), [Scheme(WeightFormat("8"), eight)]) for name in sorted(ends)]
    own += [
        (glob.escape(name), [s.with_activation(eight) if s.has_codes else s for s in quantized])
        for name in sorted(beside)
    ]
    return own + asked


def policy_record(
    policy: str, program: Program, allowed: Mapping[str, Sequence[Scheme]], rules: Rules | None
) -> dict[str, Any]:
    """What the plan says of its ends: the policy, the layers, and those of them that a rule decides instead."""
    ends, asked = ends_of(program), rule_pairs(rules)
    names = dict.fromkeys(name for found in ends.values() for name in found)
    ruled = [name for name in names if policy != SAME and name in allowed and decided_by_rule(name, asked, allowed)]
    for name in ruled:
        notice(f"first_last={policy!r} leaves {name} to your rule: {', '.join(map(str, allowed[name]))}")
    return {"policy": policy, **ends, "by_rule": ruled}
