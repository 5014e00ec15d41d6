"""The first and the last layers of a network: those with no layer before them, and those with none behind."""

from __future__ import annotations

from collections.abc import Iterable

from quantkit.program.program import Program, Step


def first_layers(program: Program) -> list[str]:
    """The layers that compute on the model's inputs with no layer in between, in execution order."""
    return _ends(program, [(op, op.inputs, op.outputs) for op in program.steps])


def last_layers(program: Program) -> list[str]:
    """The layers that nothing but the model's outputs is made of, with no layer in between, in execution order."""
    return _ends(program, [(op, op.outputs, op.inputs) for op in reversed(program.steps)])[::-1]


def _ends(program: Program, steps: Iterable[tuple[Step, tuple[int, ...], tuple[int, ...]]]) -> list[str]:
    """The layers that are met with none of the values ``near`` them (op, near, far) behind another layer."""
    layer_of = {
        call.key: name for name, calls in program.calls.items() for call in calls if call.input in program.varying
    }
    beyond: set[int] = set()
    found: list[str] = []
    met: set[str] = set()
    for op, near, far in steps:
        passed, name = not beyond.isdisjoint(near), layer_of.get(op.key)
        if name is not None and name not in met and not passed:
            found.append(name)
        met |= set() if name is None else {name}
        if passed or name is not None:
            beyond.update(far)
    return found
