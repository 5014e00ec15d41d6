"""Where activations are quantized: one site per tensor, placed by the target's fusion rules before anything is
measured.

An integer kernel reads codes and writes codes. So a quantized layer needs a site on its input and, where the runtime's
kernel writes codes (convolutions), one on its output, after the activation that the runtime fuses into it. A residual
add stays in integers when its operands and its result are sites, unless codes would serve nobody (``additions``).
Operations that only move values (slicing, padding with zero, pooling by maximum, reshaping) keep the site of what they
move: the moved tensor is an *echo*, quantized with the same codes.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field

from torch import nn

from quantkit.program.codes import fused_output, on_codes, root_of
from quantkit.program.intercept import INPUT, OpKey, read_place
from quantkit.program.layers import LayerCall
from quantkit.program.program import Program
from quantkit.program.roles import attention_roles
from quantkit.targets import Target
from quantkit.targets.roles import ADDITION_OPERAND, ADDITION_RESULT, LAYER_INPUT, LAYER_OUTPUT, PRODUCT_OPERAND


@dataclass(frozen=True)
class Site:
    """One quantized tensor: the place that makes it, the echoes that must carry the same codes, the layers that read
    it, its shape without the batch dimension, and what it is to the operations around it (``targets.roles``).
    """

    name: str
    place: OpKey
    echoes: tuple[OpKey, ...] = ()
    consumers: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    roles: tuple[str, ...] = ()


def coded_sites(sites: Iterable[Site], ranges: Container[str]) -> tuple[Site, ...]:
    """The sites that hold codes in a quantized model: those with a range."""
    return tuple(site for site in sites if site.name in ranges)


@dataclass
class _Placement:
    """Sites under construction, by root value: the values that need codes, their roles, the layers that read them."""

    program: Program
    needs: dict[int, set[int]] = field(default_factory=dict)
    roles: dict[int, dict[str, None]] = field(default_factory=dict)
    readers: dict[int, dict[str, None]] = field(default_factory=dict)

    def add(self, value: int, role: str, reader: str | None = None) -> None:
        root = root_of(self.program, value)
        self.needs.setdefault(root, set()).add(value)
        self.roles.setdefault(root, {})[role] = None
        self.readers.setdefault(root, {}).update({} if reader is None else {reader: None})

    def is_handed_back(self, root: int) -> bool:
        """Whether a value is an input of the model that it returns as it came, and that layers alone read in codes:
        these take them as they read it.
        """
        returned = root in self.program.inputs and root in self.program.outputs
        return returned and set(self.roles[root]) == {LAYER_INPUT}


def _place_layers(placement: _Placement, target: Target, layers: Iterable[str]) -> set[int]:
    """Give layers sites on what they read and, by their kernels, on what they make; returns what they make."""
    program, made = placement.program, set()
    for name in layers:
        coded = program.kinds[name] in target.output_coded and target.can_hold_codes(LAYER_OUTPUT)
        for call in program.calls[name]:
            made.add(call.output)
            placement.add(call.input, LAYER_INPUT, name)
            if coded:
                placement.add(fused_output(program, call.output, target.fused_activations), LAYER_OUTPUT)
    return made


def _place_operations(placement: _Placement, target: Target, made: Container[int], in_float: Container[OpKey]) -> None:
    """Give sums and products of activations their sites where an operand has codes. ``made``: what layers make."""
    program = placement.program
    attention = attention_roles(program)
    for op in program.steps:
        found = on_codes(program, op, target)
        if found is None or op.key in in_float or not found.takes_place(program, placement.needs, made):
            continue
        for position, value in enumerate(found.operands):
            role = attention.get((op.key, position), PRODUCT_OPERAND) if found.result is None else ADDITION_OPERAND
            if target.can_hold_codes(role):
                placement.add(value, role)
        if found.result is not None:
            placement.add(found.result, ADDITION_RESULT)


def _names(model: nn.Module, program: Program, places: Iterable[OpKey]) -> dict[OpKey, str]:
    """Inputs are ``input``, ``input.1``; what a leaf module makes last, in its first call, is named as the module;
    everything else is named by its key.
    """
    leaves = {name for name, module in model.named_modules() if name and not any(True for _ in module.children())}
    inputs = [key for key in program.producer.values() if key.scope == "" and key.op == INPUT.op]
    names = {key: f"input.{key.output}" if key.output else "input" for key in inputs}
    taken = set(names.values())
    last = {key.scope: key.op for key in program.producer.values()}
    for place in places:
        named = place.scope in leaves - taken and place == OpKey(place.scope, last[place.scope])
        names.setdefault(place, place.scope if named else str(place))
    return names


def token_sites(program: Program, layers: Iterable[str]) -> tuple[Site, ...]:
    """A site for what every call of ``layers`` reads, in execution order: quantized by that call as it comes, so that
    whoever else reads the same tensor gets it as it was made.
    """
    return _read_sites(program, ((name, call) for name in layers for call in program.calls[name]))


def _read_sites(program: Program, calls: Iterable[tuple[str, LayerCall]]) -> tuple[Site, ...]:
    """A site for what each of these calls of layers reads, in execution order."""
    order = {op.key: i for i, op in enumerate(program.steps)}
    found = []
    for name, call in calls:
        i = program.calls[name].index(call)
        label = f"{name}/input.{i}" if i else f"{name}/input"
        shape = program.shape[call.input][1:]
        site = Site(label, read_place(call.key), consumers=(name,), shape=shape, roles=(LAYER_INPUT,))
        found.append((order[call.key], site))
    return tuple(site for _, site in sorted(found, key=lambda pair: pair[0]))


def makers_of_codes(program: Program, target: Target, layers: Iterable[str]) -> dict[OpKey, tuple[str, ...]]:
    """The places of what kernels make that write codes, each with the layers that make it."""
    found: dict[OpKey, tuple[str, ...]] = {}
    for name in layers:
        if program.kinds[name] in target.output_coded:
            for call in program.calls[name]:
                place = program.producer[fused_output(program, call.output, target.fused_activations)]
                found[place] = (*found.get(place, ()), name)
    return found


def place_sites(
    model: nn.Module, program: Program, target: Target, layers: Iterable[str], in_float: Container[OpKey] = ()
) -> tuple[Site, ...]:
    """The sites that running ``layers`` quantized on ``target`` needs, in execution order. The operations ``in_float``
    get none.
    """
    placement = _Placement(program)
    _place_operations(placement, target, _place_layers(placement, target, layers), in_float)
    order = {value: i for i, value in enumerate(program.producer)}
    roots = sorted(placement.needs, key=order.__getitem__)
    names = _names(model, program, [program.producer[r] for r in roots])
    handed_back = {root for root in roots if placement.is_handed_back(root)}
    calls = [
        (name, call)
        for root in roots
        if root in handed_back
        for name in placement.readers[root]
        for call in program.calls[name]
        if root_of(program, call.input) == root
    ]
    return _read_sites(program, calls) + tuple(
        Site(
            name=names[program.producer[root]],
            place=program.producer[root],
            echoes=tuple(program.producer[v] for v in sorted(placement.needs[root] - {root})),
            consumers=tuple(placement.readers[root]),
            shape=program.shape[root][1:],
            roles=tuple(placement.roles[root]),
        )
        for root in roots
        if root not in handed_back
    )
