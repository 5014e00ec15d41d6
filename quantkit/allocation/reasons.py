"""Why each layer got its format: its damage, and what one format up or down would gain and cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from quantkit.allocation.from_profile import AllocationProblem, candidates, with_float
from quantkit.allocation.plan_costs import latency_of
from quantkit.allocation.problem import Assignment, Option, Problem
from quantkit.formats import Scheme
from quantkit.plan import Plan, Profile


def reasons(profile: Profile, allocation: AllocationProblem, assignment: Assignment) -> dict[str, str]:
    """A sentence per layer. Changes of the damage are those of the plan as it stands, pair terms included."""
    group_of = {name: group for group in allocation.problem.same for name in group}
    why = {name: f"float: {layer.reason}" for name, layer in profile.layers.items() if layer.reason}
    for name in allocation.layers:
        why[name] = _sentence(profile, allocation, assignment, group_of.get(name, (name,)))
    return {name: why[name] + _position(profile, name) for name in profile.layers if name in why}


def reasons_without_choice(profile: Profile, schemes: Mapping[str, Scheme]) -> dict[str, str]:
    """A sentence per layer where each has one candidate."""
    why = {
        name: f"float: {layer.reason}" if layer.reason else f"{schemes[name]} is its only candidate"
        for name, layer in profile.layers.items()
    }
    return {name: reason + _position(profile, name) for name, reason in why.items()}


def _position(profile: Profile, name: str) -> str:
    """The treatment of a first or last layer; empty for others, and where it is not recorded."""
    known = profile.provenance.get("first_last", {})
    position = " and ".join(end for end in ("first", "last") if name in known.get(end, ()))
    if not position:
        return ""
    policy = known["policy"]
    said = "treated as all others" if policy == "same" else f"{policy} by first_last"
    said = "stays float" if profile.layers[name].reason else said
    said = f"a rule decides, not first_last={policy!r}" if name in known["by_rule"] else said
    return f"; {position} layer: {said}"


def _sentence(profile: Profile, allocation: AllocationProblem, assignment: Assignment, group: tuple[str, ...]) -> str:
    problem = allocation.problem
    members = [allocation.layers.index(name) for name in group]
    now = problem.choices[members[0]].options[assignment[members[0]]]
    alone = sum(problem.choices[i].options[assignment[i]].damage for i in members)
    size_now = _bytes(profile, group, now)
    together = f" for {', '.join(group)} together" if len(group) > 1 else ""
    parts = [f"{now.name} adds {alone:.3g} of damage on its own{together}"]
    moves = [(_bytes(profile, group, option) - size_now, option) for option in _alternatives(problem, members, now)]
    wider = min((m for m in moves if m[0] > 0), key=lambda m: m[0], default=None)
    narrower = max((m for m in moves if m[0] < 0), key=lambda m: m[0], default=None)
    for label, move in (("up", wider), ("down", narrower)):
        if move is None:
            parts.append(f"nothing {'wider' if label == 'up' else 'narrower'} is allowed")
            continue
        change = _change(problem, assignment, members, move[1])
        parts.append(
            f"{move[1].name} would change the plan's damage by {change:+.3g} and its size by {move[0]:+,} bytes"
        )
    return "; ".join(parts)


def _alternatives(problem: Problem, members: list[int], now: Option) -> list[Option]:
    """Options that all members offer and that leave the activation format as it is."""
    offers = [{(o.name, o.tag) for o in problem.choices[i].options} for i in members]
    first = problem.choices[members[0]].options
    return [o for o in first if o.tag == now.tag and all((o.name, o.tag) in offer for offer in offers)]


def _bytes(profile: Profile, group: tuple[str, ...], option: Option) -> int:
    return sum(profile.layers[name].weight_bytes(Scheme.parse(option.name)) for name in group)


def _change(problem: Problem, assignment: Assignment, members: list[int], option: Option) -> float:
    """Change of the objective when all members take ``option``."""
    changed = list(assignment)
    for i in members:
        keys = [(o.name, o.tag) for o in problem.choices[i].options]
        changed[i] = keys.index((option.name, option.tag))
    return problem.objective(changed) - problem.objective(assignment)


def explain_latency(plan: Plan, profile: Profile, schemes: Iterable[Scheme] | None = None) -> Plan:
    """The plan with the change of predicted latency, conversions included, if each layer ran in float instead of on
    codes, or the reverse.
    """
    if profile.latency is None:
        return plan
    now, why = latency_of(profile, plan.schemes), dict(plan.why)
    for name, options in with_float(profile, candidates(profile, schemes), schemes).items():
        has_codes = plan.schemes[name].has_codes
        other = next((s for s in options if s.has_codes != has_codes), None)
        if other is not None:
            change = (latency_of(profile, {**plan.schemes, name: other}) - now) / 1e3
            instead = "float" if has_codes else "integer kernels"
            why[name] = f"{why[name]}; in {instead} it would change the latency by {change:+,.1f} microseconds"
    return replace(plan, why=why)
