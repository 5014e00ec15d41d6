"""The first and the last layers of a network: those with no layer before them, and those with none behind."""

from __future__ import annotations

from collections.abc import Iterable

from quantkit.program.trace import Op, Trace


def first_layers(trace: Trace) -> list[str]:
    """The layers that compute on the model's inputs with no layer in between, in execution order."""
    return _ends(trace, [(op, op.inputs, op.outputs) for op in trace.ops])


def last_layers(trace: Trace) -> list[str]:
    """The layers that nothing but the model's outputs is made of, with no layer in between, in execution order."""
    return _ends(trace, [(op, op.outputs, op.inputs) for op in reversed(trace.ops)])[::-1]


def _ends(trace: Trace, steps: Iterable[tuple[Op, tuple[int, ...], tuple[int, ...]]]) -> list[str]:
    """The layers that are met with none of the values ``near`` them (op, near, far) behind another layer."""
    layer_of = {call.key: name for name, calls in trace.calls.items() for call in calls if call.input in trace.varying}
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
