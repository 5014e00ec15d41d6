"""Which calls treat channels alike is read from what they compute: against the definition, by hand for each call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantkit.program.channels import channel_axes, keeps_shifts, mixed
from quantkit.program.program import Program, Step
from quantkit.program.record import record

WIDTH = 6
Call = Callable[[Tensor, Tensor], Tensor]


class Calls(nn.Module):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call
        self.table = nn.Parameter(torch.randn(5, WIDTH))
        self.gain = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.table if self.call not in GAINED else self.gain)


def scaled(x: Tensor, gain: Tensor) -> Tensor:
    return x * gain


GAINED = (scaled,)

ALIKE: dict[str, tuple[Call, int]] = {  # and the axis of the channels of what is made
    "table added": (lambda x, table: x + table, 2),
    "scaled": (lambda x, table: 3 * x, 2),
    "transposed": (lambda x, table: x.transpose(1, 2), 1),
    "permuted": (lambda x, table: x.permute(2, 0, 1), 0),
    "one token": (lambda x, table: x[:, 0], 1),
    "tokens joined": (lambda x, table: torch.cat([x, table.expand(x.shape)], 1), 2),
    "mean of tokens": (lambda x, table: x.mean(1), 1),
    "flattened": (lambda x, table: x.flatten(0, 1), 1),
    "channels of two tokens": (lambda x, table: x[:, :4].reshape(2, 2, 2 * WIDTH), 2),
    "padded": (lambda x, table: F.pad(x, (0, 0, 0, 3)), 2),
    "rolled": (lambda x, table: torch.roll(x, 1, 1), 2),
    "masked": (lambda x, table: x.masked_fill(torch.ones(2, 5, 1, dtype=torch.bool), 0.0), 2),
}
APART: dict[str, Call] = {
    "activation": lambda x, table: torch.relu(x),
    "magnitude": lambda x, table: x.abs(),
    "gain": scaled,
    "half of them": lambda x, table: x[..., : WIDTH // 2],
    "mean over them": lambda x, table: x.mean(-1, keepdim=True),
    "their order": lambda x, table: x.flip(-1),
    "rolled": lambda x, table: torch.roll(x, 1, 2),
    "maximum of tokens": lambda x, table: x.amax(1),
    "something added": lambda x, table: x + 1.0,
    "channels of two tokens, mixed": lambda x, table: (
        x[:, :4].reshape(2, 2, 2, WIDTH).transpose(2, 3).reshape(2, 2, -1)
    ),
}


def last_step(call: Call) -> tuple[Program, Step]:
    program = record(Calls(call).eval(), ((torch.randn(2, 5, WIDTH),), {}))
    return program, [step for step in program.steps if program.varying & {*step.outputs}][-1]


def axes_through(call: Call) -> dict[int, int] | None:
    """The axes of the channels along all calls from the input on."""
    program, last = last_step(call)
    axes: dict[int, int] = {program.inputs[0]: 2}
    for step in program.steps:
        if {*step.inputs} & {*axes}:
            found = channel_axes(program, step, {n: axes[n] for n in step.inputs if n in axes}, WIDTH)
            if found is None:
                return None
            axes |= found
    return axes if last.outputs[0] in axes else None


@pytest.mark.parametrize("name", ALIKE)
def test_calls_that_treat_channels_alike_are_followed(name: str) -> None:
    call, axis = ALIKE[name]
    axes = axes_through(call)
    assert axes is not None
    _, last = last_step(call)
    assert axes[last.outputs[0]] == axis
    x, table = torch.randn(2, 5, WIDTH), torch.randn(5, WIDTH)
    matrix, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH))
    after = call(mixed(x, matrix, 2), mixed(table, matrix, 1))  # where the call reads the table, it follows too
    torch.testing.assert_close(after, mixed(call(x, table), matrix, axis), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", APART)
def test_calls_that_do_not_are_told(name: str) -> None:
    assert axes_through(APART[name]) is None


def test_what_is_known_behind_a_call_tells_what_is_in_front_of_it() -> None:
    program, step = last_step(ALIKE["transposed"][0])
    assert channel_axes(program, step, {step.outputs[0]: 1}, WIDTH) == {step.inputs[0]: 2, step.outputs[0]: 1}
    assert channel_axes(program, step, {step.outputs[0]: 1}, WIDTH + 1) is None


def test_zeros_follow_whatever_is_known() -> None:
    program = record(Calls(lambda x, table: x + torch.zeros(x.shape)).eval(), ((torch.randn(2, 5, WIDTH),), {}))
    zeros = next(step for step in program.steps if step.key.op == "zeros")
    assert channel_axes(program, zeros, {zeros.outputs[0]: 2}, WIDTH) == {zeros.outputs[0]: 2}


@pytest.mark.parametrize(("name", "kept"), [("one token", True), ("mean of tokens", True), ("padded", False)])
def test_padding_with_zeros_does_not_move_a_shift(name: str, kept: bool) -> None:
    program, step = last_step(ALIKE[name][0])
    axes = channel_axes(program, step, {step.inputs[0]: 2}, WIDTH)
    assert axes is not None
    assert keeps_shifts(program, step, axes) == kept
