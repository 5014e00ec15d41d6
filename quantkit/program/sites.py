"""Where activations are quantized: one site per tensor, placed by the target's fusion rules before anything is
measured.

An integer kernel reads codes and writes codes. So a quantized layer needs a site on its input and, where the runtime's
kernel writes codes (convolutions), one on its output, after the activation that the runtime fuses into it. A residual
add stays in integers when its operands and its result are sites, unless codes would serve nobody (``additions``).
Operations that only move values (slicing, padding with zero, pooling by maximum, reshaping) keep the site of what they
move: the moved tensor is an *echo*, quantized with the same codes.

A tensor that is made in float, and that others than layers read too, keeps its values for these: a transformer adds
what a norm made to what comes next, and 8 bits of every such sum would be lost. The layers take its codes as they read
it, by one quantizer.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field

from torch import nn

from quantkit.program.codes import fused_output, moves_values, on_codes, root_of
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

    Where others read it in float, ``place`` is that of the first call of a layer that reads it (``read_place``), and
    ``copies`` are those of the other calls.
    """

    name: str
    place: OpKey
    echoes: tuple[OpKey, ...] = ()
    consumers: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    roles: tuple[str, ...] = ()
    copies: tuple[OpKey, ...] = ()

    @property
    def places(self) -> tuple[OpKey, ...]:
        """Where it is quantized: where it is made, or where each of its layers reads it."""
        return (self.place, *self.copies)


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

    def calls_reading(self, root: int) -> list[LayerCall]:
        """The calls of layers that read the codes of a value, in execution order."""
        program = self.program
        calls = {call.key: call for name in self.readers[root] for call in program.calls[name]}
        order = (calls[step.key] for step in program.steps if step.key in calls)
        return [call for call in order if root_of(program, call.input) == root]

    def is_float_for_others(self, root: int) -> bool:
        """Whether no kernel makes the codes of a value, layers alone read them, as what their calls read first, and
        others read it as well.
        """
        if set(self.roles[root]) != {LAYER_INPUT}:
            return False
        calls = {call.key: call.input for call in self.calls_reading(root)}
        first = {step.key: step.inputs[0] for step in self.program.steps if step.key in calls}
        return first == calls and self._is_read_beside(calls, root)

    def _is_read_beside(self, calls: Container[OpKey], value: int) -> bool:
        """Whether a value, as it is or moved, is returned or read by more than these calls."""
        if value in self.program.outputs:
            return True
        others = [step for step in self.program.consumers.get(value, ()) if step.key not in calls]
        return any(
            not moves_values(step) or any(self._is_read_beside(calls, moved) for moved in step.outputs)
            for step in others
        )


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
        if found is None or op.key in in_float:
            continue
        follows = (op.key, 0) in attention and any(_follows(program, value, made) for value in op.inputs)
        if not follows and not found.takes_place(program, placement.needs, made):
            continue
        for position, value in enumerate(found.operands):
            role = attention.get((op.key, position), PRODUCT_OPERAND) if found.result is None else ADDITION_OPERAND
            if target.can_hold_codes(role):
                placement.add(value, role)
        if found.result is not None:
            placement.add(found.result, ADDITION_RESULT)


def _follows(program: Program, value: int, made: Container[int]) -> bool:
    """Whether a value is what layers make, through whatever is no layer, as rotations and norms of queries are."""
    layers = {call.output for calls in program.calls.values() for call in calls}
    waiting, seen = [value], {value}
    while waiting:
        number = waiting.pop()
        if number in made:
            return True
        step = None if number in layers else program.makers.get(number)
        further = () if step is None else (other for other in step.inputs if other not in seen)
        for other in further:
            seen.add(other)
            waiting.append(other)
    return False


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
    order = {op.key: i for i, op in enumerate(program.steps)}
    found = []
    for name in layers:
        for i, call in enumerate(program.calls[name]):
            label = f"{name}/input.{i}" if i else f"{name}/input"
            shape = program.shape[call.input][1:]
            site = Site(label, read_place(call.key), consumers=(name,), shape=shape, roles=(LAYER_INPUT,))
            found.append((order[call.key], site))
    return tuple(site for _, site in sorted(found, key=lambda pair: pair[0]))


def sites_by_maker(program: Program, sites: Iterable[Site]) -> dict[OpKey, str]:
    """The place that makes a site's tensor -> the site, also where that is quantized as it is read."""
    read = {read_place(step.key): step.inputs[0] for step in program.steps if step.inputs}

    def maker(place: OpKey) -> OpKey:
        return program.producer[root_of(program, read[place])] if place in read else place

    return {maker(site.place): site.name for site in sites}


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
    return tuple(_site(placement, root, names[program.producer[root]]) for root in roots)


def _site(placement: _Placement, root: int, name: str) -> Site:
    """The site of a value that needs codes."""
    program = placement.program
    consumers, shape, roles = tuple(placement.readers[root]), program.shape[root][1:], tuple(placement.roles[root])
    if placement.is_float_for_others(root):
        place, *copies = dict.fromkeys(read_place(call.key) for call in placement.calls_reading(root))
        return Site(name, place, (), consumers, shape, roles, tuple(copies))
    echoes = tuple(program.producer[value] for value in sorted(placement.needs[root] - {root}))
    return Site(name, program.producer[root], echoes, consumers, shape, roles)
