"""Whether a model's answer is a representation, as an embedding of a sentence or an image is, or scores of classes.

Scores are what a layer makes. What a norm makes, or the sum of a value and what was computed from it (a residual), is
read by whatever comes next, and a softmax over its channels means nothing.
"""

from __future__ import annotations

from quantkit.program.program import Program, Step

_NORMS = frozenset("layer_norm rms_norm group_norm instance_norm normalize rsqrt norm vector_norm".split())


def is_representation(program: Program) -> bool:
    """Whether a norm or a residual sum comes behind the last layers on the way to the model's answer."""
    return any(step.key.op in _NORMS or _is_residual(program, step) for step in _behind_layers(program))


def _behind_layers(program: Program) -> list[Step]:
    """The steps on the ways to the answer from the last layers, those excluded."""
    found, seen, wanted = list[Step](), set[int](), [program.output]
    while wanted:
        number = wanted.pop()
        step = program.makers.get(number)
        if number in seen or step is None or step.key in program.layer_of:
            continue
        seen.add(number)
        found.append(step)
        wanted += [n for n in step.reads if n in program.varying]
    return found


def _is_residual(program: Program, step: Step) -> bool:
    """Whether a step adds to a value what was computed from it."""
    added = {n for n in step.inputs if n in program.varying}
    if step.key.op != "add" or len(added) != 2:
        return False
    return any(added <= program.depending_on({number}) for number in added)
