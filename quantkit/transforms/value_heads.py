"""Heads of attention between the layer that makes values and the one that reads what probabilities make of them.

Attention is linear in its values: a matrix may multiply a head's values, and the layer behind takes it out again.
Which rows of one layer and which columns of the other are a head is read from labels of channels that are sent through
the calls between them, whatever these are: views, transposes, repetitions for grouped queries, slices of one
projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.program.intercept import CALL_ERRORS, tensors_of
from quantkit.program.program import Program, Step
from quantkit.program.roles import attention_roles
from quantkit.targets.roles import VALUE
from quantkit.transforms.prepare import Prepared


@dataclass(frozen=True)
class ValueHeads:
    """The heads of an attention: ``rows`` (heads, width) of layer ``values``, and for each the columns (heads,
    queries, width) of layer ``output``, of every head of queries that reads it. ``bias`` names the stored tensor that
    holds the bias of ``values``, ``positions`` (heads, width) are those of the rows in it. ``name``: the product that
    reads them.
    """

    name: str
    values: str
    output: str
    rows: Tensor
    columns: Tensor
    bias: str | None = None
    positions: Tensor | None = None


class _CannotFollow(Exception):
    """The reason why heads stay as they are."""


def value_heads(ready: Prepared) -> tuple[list[ValueHeads], dict[str, str]]:
    """The heads of every attention that can be followed, in execution order, and for the others, by name, why not."""
    found, reasons = [], {}
    products = {key: at for (key, at), role in attention_roles(ready.program).items() if role == VALUE}
    for step in ready.program.steps:
        if step.key not in products:
            continue
        try:
            found.append(_heads_of(ready, step, products[step.key]))
        except _CannotFollow as reason:
            reasons[str(step.key)] = str(reason)
    return found, reasons


def _heads_of(ready: Prepared, product: Step, position: int) -> ValueHeads:
    program = ready.program
    if position != len(product.inputs) - 1:
        raise _CannotFollow("the values are on the left of the product")
    values, made = _maker(program, product.inputs[position])
    of_values = _Moved(program, made, _numbered(program.shape[made], len(program.shape[made]) - 1))
    rows = of_values.at(product.inputs[position])[..., 0, :]
    of_values.require_only(product, rows)

    shape = program.shape[product.outputs[0]]
    of_mixed = _Moved(program, product.outputs[0], _numbered((*shape[:-2], 1, shape[-1])).expand(shape))
    output, read = _reader(program, of_mixed)
    heads, columns = _grouped(rows.expand(*shape[:-2], -1).reshape(-1, shape[-1]), read.reshape(-1, read.shape[-1])[0])
    for layer, side in ((values, 0), (output, 1)):
        weight = ready.weights.layers[layer]
        if not weight.reads_rows or weight.groups != 1 or len(program.calls[layer]) > 1 or len(weight.shape) != 2:
            raise _CannotFollow(f"{layer} is a {weight.kind} that cannot take a matrix up")
        if weight.shape[side] != (program.shape[made] if side == 0 else read.shape)[-1]:
            raise _CannotFollow(f"{layer} has other channels in the program")
    bias, positions = _bias(program, program.makers[made], heads)
    return ValueHeads(str(product.key), values, output, heads, columns, bias, positions)


def _maker(program: Program, value: int) -> tuple[str, int]:
    """The layer that makes what a value is moved from, and its output."""
    while (maker := program.makers.get(value)) is not None and maker.key not in program.layer_of:
        floats = _floats(program, maker)
        if len(floats) != 1:
            raise _CannotFollow(f"{maker.key} makes the values, which is no linear layer")
        value = floats[0]
    if maker is None:
        raise _CannotFollow(f"no layer makes the values, but {program.producer.get(value, 'a stored tensor')}")
    return program.layer_of[maker.key], value


def _reader(program: Program, moved: _Moved) -> tuple[str, Tensor]:
    """The layer that reads all of what a product makes, and the labels of what it reads."""
    keys = ", ".join(str(step.key) for _, step in moved.ends) or "nothing"
    if len(moved.ends) != 1 or moved.ends[0][1].key not in program.layer_of:
        raise _CannotFollow(f"{keys} reads what it makes, and not one linear layer")
    value, step = moved.ends[0]
    layer = program.layer_of[step.key]
    if all(call.input != value for call in program.calls[layer]):
        raise _CannotFollow(f"{layer} reads what it makes as a weight")
    return layer, moved.at(value)


def _grouped(rows: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
    """The heads of values, of the rows (heads of queries, width) that each head of queries reads; and for each of them
    the columns, of the labels of what is made of them along the columns.
    """
    width = rows.shape[-1]
    heads, of_query = torch.unique(rows, dim=0, return_inverse=True)
    columns: list[list[Tensor]] = [[] for _ in heads]
    for query in (read // width).unique():
        at = (read // width == query).nonzero().reshape(-1)
        columns[int(of_query[query])].append(at[(read[at] % width).argsort()])
    if len(heads.unique()) != heads.numel() or len({len(own) for own in columns}) != 1 or not columns[0]:
        raise _CannotFollow("heads share channels")
    if any(len(one) != width for own in columns for one in own):
        raise _CannotFollow("what reads the heads does not read all of their channels")
    return heads, torch.stack([torch.stack(own) for own in columns])


def _bias(program: Program, step: Step, heads: Tensor) -> tuple[str | None, Tensor | None]:
    """The stored tensor that holds the bias of a layer's call, and the positions of heads in it."""
    floats = [n for n in step.inputs if n in program.floating and len(program.shape[n]) == 1]
    if not floats:
        return None, None
    value = floats[0]
    while (maker := program.makers.get(value)) is not None and len(maker.inputs) == 1:
        value = maker.inputs[0]
    if value not in program.names:
        raise _CannotFollow(f"{step.key} adds a bias that is not stored")
    labels = _Moved(program, value, _numbered(program.shape[value])).at(floats[0])
    return program.names[value], labels[heads]


def _numbered(shape: tuple[int, ...], axis: int | None = None) -> Tensor:
    """Numbers from 0 for all elements, or for those along an axis."""
    if axis is None:
        return torch.arange(torch.Size(shape).numel(), device="cpu").reshape(shape)
    return torch.arange(shape[axis], device="cpu").expand(shape)


def _floats(program: Program, step: Step) -> list[int]:
    """The floating-point values that a call reads, without empty ones, as a cache is before the first token."""
    return [n for n in dict.fromkeys(step.inputs) if n in program.floating and 0 not in program.shape[n]]


class _Moved:
    """Where the elements of a value go: ``labels`` has those of all values that only moved elements are in, ``ends``
    are the values that others read, with the calls.
    """

    def __init__(self, program: Program, start: int, labels: Tensor) -> None:
        self.program = program
        generator = torch.Generator().manual_seed(0)
        count = int(labels.max()) + 2
        self.signed = torch.arange(count, device="cpu").double()  # label + 1, with a sign that absolute values lose
        self.signed *= torch.randint(0, 2, (count,), generator=generator, device="cpu").double() * 2 - 1
        self.values = {start: self.signed[labels + 1]}
        self.ends: list[tuple[int, Step]] = []
        waiting = [start]
        while waiting:
            value = waiting.pop(0)
            for step in {step.key: step for step in program.consumers.get(value, ())}.values():
                moved = None if step.key in program.layer_of else self._behind(step, value)
                if moved is None:
                    self.ends.append((value, step))
                else:
                    waiting += [made for made in moved if made not in self.values]
                    self.values |= moved

    def at(self, value: int) -> Tensor:
        """The labels of a value's elements; raises _CannotFollow where some of them come from elsewhere."""
        if value not in self.values or bool((self.values[value] == 0).any()):
            raise _CannotFollow(f"{self.program.producer.get(value, 'what is read')} is not only moved there")
        return self.values[value].abs().long() - 1

    def require_only(self, product: Step, labels: Tensor) -> None:
        """Raise _CannotFollow where elements of these labels are read elsewhere, or returned."""
        wanted = labels.unique() + 1
        for value in self.program.outputs:
            if value in self.values and bool(torch.isin(self.values[value].abs().long(), wanted).any()):
                raise _CannotFollow("the model returns the values")
        for value, step in self.ends:
            if step.key != product.key and bool(torch.isin(self.values[value].abs().long(), wanted).any()):
                raise _CannotFollow(f"{step.key} reads the values too")

    def _behind(self, step: Step, value: int) -> dict[int, Tensor] | None:
        """What a call makes of a value's labels; None where it does more than to move them, or leave zeros."""
        if _floats(self.program, step) != [value] or step.rewrites:
            return None
        made: Any = None
        for kind in (torch.long, torch.bool):
            others = {n: torch.zeros(self.program.shape[n], dtype=kind, device="cpu") for n in step.inputs}
            try:
                args, kwargs = step.called(others | {value: self.values[value].clone()}, self.program.shape)
                made = step.func(*args, **kwargs)
                break
            except CALL_ERRORS:
                continue
        if made is None:
            return None
        wanted = set(step.outputs)
        found = {n: x.double() for n, x in zip(step.makes, tensors_of(made), strict=True) if n in wanted}
        return found if found and all(map(self._are_labels, found.values())) else None

    def _are_labels(self, x: Tensor) -> bool:
        return bool((x == self.signed[x.abs().long().clamp(max=len(self.signed) - 1)]).all())
