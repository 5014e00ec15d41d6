"""Where activations are quantized: one site per tensor, placed by the target's fusion rules before anything is
measured.

An integer kernel reads codes and writes codes. So a quantized layer needs a site on its input and, where the runtime's
kernel writes codes (convolutions), one on its output, after the activation that the runtime fuses into it. A residual
add stays in integers when its operands and its result are sites. Operations that only move values (slicing, padding
with zero, pooling by maximum, reshaping) keep the site of what they move: the moved tensor is an *echo*, quantized
with the same codes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from torch import nn

from quantkit.program.intercept import INPUT, OpKey, read_place
from quantkit.program.program import Program as Trace
from quantkit.program.program import Step as Op
from quantkit.targets import Target

_MOVES = frozenset(
    "reshape reshape_as view view_as flatten unflatten squeeze unsqueeze permute transpose t T mT swapaxes movedim "
    "contiguous clone detach getitem select narrow chunk split unbind expand expand_as max_pool1d max_pool2d "
    "max_pool3d pixel_shuffle channel_shuffle".split()
)


@dataclass(frozen=True)
class Site:
    """One quantized tensor: the place that makes it, the echoes that must carry the same codes, the layers that read
    it and its shape without the batch dimension.
    """

    name: str
    place: OpKey
    echoes: tuple[OpKey, ...] = ()
    consumers: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()


def moves_values(op: Op) -> bool:
    """True when every output element is an input element or zero, so that codes can be moved instead of values."""
    if op.key.op == "pad":
        mode = next((a for a in op.arguments if isinstance(a, str)), "constant")
        fill = next((a for a in op.arguments if isinstance(a, float | int) and not isinstance(a, bool)), 0)
        return mode == "constant" and fill == 0
    return op.key.op in _MOVES


def root_of(trace: Trace, value: int) -> int:
    """The value whose codes this one carries: back through operations that only move values."""
    while (op := trace.makers.get(value)) is not None and moves_values(op) and op.inputs:
        value = op.inputs[0]
    return value


def can_hold_site(trace: Trace, value: int) -> bool:
    """True when the value, or the one it was moved from, is made at a place that running the model again will find."""
    return root_of(trace, value) in trace.producer


def fused_output(trace: Trace, value: int, activations: Iterable[str]) -> int:
    """The value after the activation a runtime fuses into the operation that made ``value`` (or ``value`` itself)."""
    readers = trace.consumers.get(value, ())
    if (
        len(readers) == 1
        and readers[0].key.op in activations
        and len(readers[0].inputs) == 1
        and value not in trace.outputs
    ):
        return readers[0].outputs[0]
    return value


def runs_on_codes(trace: Trace, op: Op) -> bool:
    """True when all operands of an element-wise operation are activations of one shape that can be sites."""
    if len(op.inputs) < 2 or len(op.outputs) != 1 or any(a != 1 for a in op.arguments):  # alpha is a multiplication
        return False
    if not all(v in trace.varying and v in trace.producer and can_hold_site(trace, v) for v in op.inputs):
        return False
    return len({trace.shape[v] for v in op.inputs}) == 1


def product_on_codes(trace: Trace, op: Op, coded: Collection[int]) -> bool:
    """True when both operands of a product are activations that can be sites and one was moved from a value in
    ``coded``.
    """
    if len(op.inputs) != 2 or len(op.outputs) != 1:
        return False
    if not all(v in trace.varying and v in trace.producer and can_hold_site(trace, v) for v in op.inputs):
        return False
    return any(root_of(trace, v) in coded for v in op.inputs)


@dataclass
class _Placement:
    """Sites under construction: root value -> values that need codes, and root value -> layers that read it."""

    trace: Trace
    needs: dict[int, set[int]] = field(default_factory=dict)
    readers: dict[int, list[str]] = field(default_factory=dict)

    def add(self, value: int, reader: str | None = None) -> None:
        root = root_of(self.trace, value)
        self.needs.setdefault(root, set()).add(value)
        readers = self.readers.setdefault(root, [])
        if reader is not None and reader not in readers:
            readers.append(reader)


def _place_integer_op(placement: _Placement, op: Op, target: Target) -> None:
    """Give an element-wise operation sites when it runs on codes and one of its operands already has a site."""
    trace = placement.trace
    if not runs_on_codes(trace, op) or not any(root_of(trace, v) in placement.needs for v in op.inputs):
        return
    for value in (*op.inputs, fused_output(trace, op.outputs[0], target.fused_activations)):
        placement.add(value)


def _names(model: nn.Module, trace: Trace, places: Iterable[OpKey]) -> dict[OpKey, str]:
    """Inputs are ``input``, ``input.1``; what a leaf module makes last, in its first call, is named as the module;
    everything else is named by its key.
    """
    leaves = {name for name, module in model.named_modules() if name and not any(True for _ in module.children())}
    inputs = [key for key in trace.producer.values() if key.scope == "" and key.op == INPUT.op]
    names = {key: f"input.{key.output}" if key.output else "input" for key in inputs}
    taken = set(names.values())
    last = {key.scope: key.op for key in trace.producer.values()}
    for place in places:
        named = place.scope in leaves - taken and place == OpKey(place.scope, last[place.scope])
        names.setdefault(place, place.scope if named else str(place))
    return names


def token_sites(trace: Trace, layers: Iterable[str]) -> tuple[Site, ...]:
    """A site for what every call of ``layers`` reads, in execution order: quantized by that call as it comes, so that
    whoever else reads the same tensor gets it as it was made.
    """
    order = {op.key: i for i, op in enumerate(trace.steps)}
    found = []
    for name in layers:
        for i, call in enumerate(trace.calls[name]):
            label = f"{name}/input.{i}" if i else f"{name}/input"
            site = Site(label, read_place(call.key), consumers=(name,), shape=trace.shape[call.input][1:])
            found.append((order[call.key], site))
    return tuple(site for _, site in sorted(found, key=lambda pair: pair[0]))


def place_sites(model: nn.Module, trace: Trace, target: Target, layers: Iterable[str]) -> tuple[Site, ...]:
    """The sites that running ``layers`` quantized on ``target`` needs, in execution order."""
    placement, layers = _Placement(trace), list(layers)
    for name in layers:
        for call in trace.calls[name]:
            placement.add(call.input, name)
            if trace.kinds[name] in target.output_coded:
                placement.add(fused_output(trace, call.output, target.fused_activations))
    made = {call.output for name in layers for call in trace.calls[name]}
    for op in trace.steps:
        if op.key.op in target.integer_ops:
            _place_integer_op(placement, op, target)
        elif op.key.op in target.integer_products and product_on_codes(trace, op, made | placement.needs.keys()):
            for value in op.inputs:
                placement.add(value)
    order = {value: i for i, value in enumerate(trace.producer)}
    roots = sorted(placement.needs, key=order.__getitem__)
    names = _names(model, trace, [trace.producer[r] for r in roots])
    return tuple(
        Site(
            name=names[trace.producer[root]],
            place=trace.producer[root],
            echoes=tuple(trace.producer[v] for v in sorted(placement.needs[root] - {root})),
            consumers=tuple(placement.readers[root]),
            shape=trace.shape[root][1:],
        )
        for root in roots
    )
