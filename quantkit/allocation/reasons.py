"""Why each layer got its format: its damage, and what one format up or down would gain and cost."""

from __future__ import annotations

import numpy as np

from quantkit.allocation.from_profile import Question
from quantkit.allocation.problem import Assignment, Option, Problem
from quantkit.formats import Scheme
from quantkit.plan import Profile


def reasons(profile: Profile, asked: Question, assignment: Assignment) -> dict[str, str]:
    """A sentence per layer. Changes of the damage are those of the plan as it stands, pair terms included."""
    group_of = {name: group for group in asked.problem.same for name in group}
    why = {name: f"float: {layer.reason}" for name, layer in profile.layers.items() if layer.reason}
    for name in asked.layers:
        why[name] = _sentence(profile, asked, assignment, group_of.get(name, (name,)))
    return {name: why[name] for name in profile.layers if name in why}


def _sentence(profile: Profile, asked: Question, assignment: Assignment, group: tuple[str, ...]) -> str:
    problem = asked.problem
    members = [asked.layers.index(name) for name in group]
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
    if problem.pairs is None:
        return problem.separable_objective(changed) - problem.separable_objective(assignment)
    old, new = (np.array(problem.positions(a)) for a in (assignment, changed))
    return problem.objective(changed) - problem.objective(assignment) if not np.array_equal(old, new) else 0.0
