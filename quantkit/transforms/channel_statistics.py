"""How large the values are that a group of factors goes into, channel by channel, and some of them as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantkit.program.intercept import OpKey
from quantkit.program.padding import Given
from quantkit.program.program import Program
from quantkit.program.updates import plain_mode, restored
from quantkit.simulation.model import run_with
from quantkit.transforms.channel_groups import Group, Member
from quantkit.transforms.channel_labels import COLUMNS, GAIN
from quantkit.transforms.registry import Setting

ROWS = 512  # of what each layer reads that errors are measured on
ELEMENTS = 1 << 18  # of images that errors are measured on, for each layer
KEPT_BYTES = 1 << 28  # of values held at once


@dataclass
class Seen:
    """Of a group: the largest magnitude of each channel, where it is multiplied by the factor (``made``) and where by
    the inverse (``inverse``), and its mean magnitude (``mean``); of each layer that reads it, some of its inputs.
    """

    made: Tensor
    inverse: Tensor
    mean: Tensor
    inputs: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def nothing(cls, size: int) -> Seen:
        made, inverse, mean = torch.zeros(3, size, dtype=torch.float64, device="cpu")
        return cls(made, inverse, mean)


def seen_of(setting: Setting, groups: Sequence[Group]) -> Iterator[tuple[Group, Seen]]:
    """What is seen of each group over the batches of a setting, without rows under padding; as many groups a pass as
    memory allows.
    """
    weights = setting.ready.weights
    held = [sum(4 * ROWS * weights.inputs(m.name) for m in group.of_kind(COLUMNS)) for group in groups]
    start = 0
    while start < len(groups):
        stop, size = start + 1, held[start]
        while stop < len(groups) and size + held[stop] <= KEPT_BYTES:
            stop, size = stop + 1, size + held[stop]
        yield from zip(groups[start:stop], _pass(setting, groups[start:stop]), strict=True)
        start = stop


def channel_axis(program: Program, member: Member) -> int:
    """The axis of the channels in the values of a member."""
    spatial = 0 if member.kind == GAIN else max(0, len(program.weights[member.name].shape) - 2)
    return -1 - spatial


def _values(program: Program, group: Group) -> Iterator[tuple[Member, int]]:
    """The members of a group whose values show its channels, with those values: what layers read where there are such,
    otherwise what layers and norms make.
    """
    readers = group.of_kind(COLUMNS)
    for member in readers or group.members:
        if member.kind == GAIN:
            assert member.norm is not None, "what a gain's vector is made for"
            yield member, member.norm.output
        else:
            calls = program.calls[member.name]
            yield from ((member, call.input if member.kind == COLUMNS else call.output) for call in calls)


def _pass(setting: Setting, groups: Sequence[Group]) -> list[Seen]:
    """One pass over the batches for some groups."""
    ready, program = setting.ready, setting.ready.program
    found = [Seen.nothing(group.size) for group in groups]
    at: dict[OpKey, list[tuple[int, Member, int]]] = {}
    for i, group in enumerate(groups):
        for member, value in _values(program, group):
            at.setdefault(program.producer[value], []).append((i, member, value))
    given: Given = {}

    def see(place: OpKey, x: Tensor) -> Tensor:
        for i, member, value in at.get(place, ()):
            axis = channel_axis(program, member)
            rows = x.detach().movedim(axis, -1)
            if ready.padding is not None and axis == -1:
                rows = ready.padding.rows_of(value, given)(rows)
            _note(found[i], groups[i], member, rows.reshape(-1, rows.shape[-1]).cpu())
            if member.kind == COLUMNS:
                kept = x.detach().cpu() if axis != -1 else rows.reshape(-1, rows.shape[-1]).cpu()
                _keep(found[i].inputs, member.name, kept, axis == -1, len(setting.batches))
        return x

    for batch in setting.batches:
        given = {} if ready.padding is None else ready.padding.given(batch)
        with plain_mode(ready.model), restored(ready.model):
            run_with(ready.model, see, *batch)
    return found


def _note(seen: Seen, group: Group, member: Member, rows: Tensor) -> None:
    """Add rows (n, channels): of channels with one factor the largest, or, where the values are made and multiplied
    with each other, what rotations between them leave as it is, the root of the sum of their squares.
    """
    own = member.channel >= 0
    channel, size = member.channel[own], rows.abs()[:, own].double()
    if group.of_kind(COLUMNS):
        seen.made.scatter_reduce_(0, channel, size.amax(0), "amax")
        seen.mean.index_add_(0, channel, size.mean(0))
        return
    together = torch.zeros(len(rows), group.size, dtype=torch.float64, device="cpu").index_add_(1, channel, size**2)
    into = seen.inverse if member.inverse else seen.made
    torch.maximum(into, together.sqrt().amax(0), out=into)


def _keep(inputs: dict[str, Tensor], name: str, x: Tensor, in_rows: bool, batches: int) -> None:
    """Hold some of what a layer reads, evenly spaced, the same share of each batch."""
    most = ROWS if in_rows else max(1, ELEMENTS // x[0].numel())
    some = x[:: max(1, len(x) * batches // most)].float()
    before: Mapping[str, Tensor] = inputs
    inputs[name] = torch.cat([before[name], some])[:most] if name in before else some[:most]
