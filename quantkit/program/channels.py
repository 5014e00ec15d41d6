"""Which calls treat every channel alike: what they make of values whose channels are mixed by a matrix is what they
made before, mixed by that matrix.

Additions, scalings by one number, means over tokens, resampling, padding with zeros, whatever moves tokens: no list of
names, but a run of the call on random numbers whose channels were mixed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from quantkit.program.intercept import CALL_ERRORS, tensors_of
from quantkit.program.program import Program, Step

Axes = dict[int, int]
_CLOSE = 1e-4  # of the largest value: calls run in float32
_COMBINATIONS = 64


def mixed(x: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """``x`` with its channels along ``axis`` multiplied by a matrix from the right; where there are several times as
    many channels as the matrix has rows, one run of them after the other.
    """
    last = x.movedim(axis, -1)
    return (last.reshape(*last.shape[:-1], -1, len(matrix)) @ matrix.to(last)).reshape(last.shape).movedim(-1, axis)


def channel_axes(program: Program, step: Step, known: Mapping[int, int], width: int) -> Axes | None:
    """The axes of the channels, ``width`` or a multiple, of all values that a call reads or makes and that follow the
    values ``known`` with theirs; None where it does not treat channels alike.
    """
    trial = _Trial(program, step)
    plain = trial.run({})
    if plain is None or any(new in program.consumers for _, new in step.rewrites if new not in step.makes):
        return None
    if not step.inputs:  # what is zero is so however it is mixed
        return dict(known) if not any(bool(x.any()) for x in plain) else None
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(width, generator=generator, device="cpu")
    matrix = torch.eye(width, device="cpu") - 2 * torch.outer(direction, direction) / direction.square().sum()
    for axes in itertools.islice(_options(program, trial.floats, known, width), _COMBINATIONS):
        made = trial.run({n: mixed(trial.values[n], matrix, axis) for n, axis in axes.items()})
        found = None if made is None else _axes_of(step, plain, made, known, matrix)
        if found is not None:
            return axes | found
    return None


def keeps_shifts(program: Program, step: Step, axes: Mapping[int, int]) -> bool:
    """Whether numbers added to the channels of what a call reads are added to those of what it makes."""
    trial = _Trial(program, step)
    plain = trial.run({})
    width = min(trial.values[n].shape[axis] for n, axis in axes.items() if n in trial.values)
    shift = torch.randn(width, generator=torch.Generator().manual_seed(2), device="cpu")
    made = trial.run({n: _shifted(trial.values[n], shift, axes[n]) for n in trial.floats if n in axes})
    if plain is None or made is None:
        return False
    pairs = zip(step.outputs, plain, made, strict=True)
    return all(_close(after, _shifted(before, shift, axes[number])) for number, before, after in pairs)


def _shifted(x: Tensor, shift: Tensor, axis: int) -> Tensor:
    last = x.movedim(axis, -1)
    return (last + shift.repeat(last.shape[-1] // len(shift))).movedim(-1, axis)


def _options(program: Program, floats: tuple[int, ...], known: Mapping[int, int], width: int) -> Iterator[Axes]:
    """The ways in which a call's floating-point operands may follow: each along an axis that is wide enough, or, if it
    is not known, not at all.
    """
    choices: list[list[int | None]] = []
    for number in floats:
        if number in known:
            choices.append([known[number]])
        else:
            choices.append([None, *_wide(program.shape[number], width)])
    for chosen in itertools.product(*choices):
        axes = {number: axis for number, axis in zip(floats, chosen, strict=True) if axis is not None}
        if axes:
            yield axes


def _wide(shape: tuple[int, ...], width: int) -> list[int]:
    return [axis for axis, size in enumerate(shape) if size and size % width == 0]


def _axes_of(
    step: Step, plain: list[Tensor], made: list[Tensor], known: Mapping[int, int], matrix: Tensor
) -> Axes | None:
    """The axes along which what a call makes follows; None where some of it does not."""
    found: Axes = {}
    for number, before, after in zip(step.outputs, plain, made, strict=True):
        axes = [known[number]] if number in known else _wide(tuple(before.shape), len(matrix))
        fitting = next((axis for axis in axes if _close(after, mixed(before, matrix, axis))), None)
        if fitting is None:
            return None
        found[number] = fitting
    return found


def _close(found: Tensor, wanted: Tensor) -> bool:
    if found.shape != wanted.shape or not found.numel():
        return False
    return float((found - wanted).abs().max()) <= _CLOSE * max(float(wanted.abs().max()), 1e-6)


class _Trial:
    """A call on random numbers: floating-point operands are normal, flags coins, whole numbers zero."""

    def __init__(self, program: Program, step: Step) -> None:
        self.step, self.shapes = step, program.shape
        self.floats = tuple(dict.fromkeys(n for n in step.inputs if n in program.floating))
        draws = torch.Generator().manual_seed(0)
        self.values = {n: torch.randn(program.shape[n], generator=draws, device="cpu") for n in self.floats}
        others = {n: program.shape[n] for n in step.inputs if n not in self.values}
        self.others = {n: torch.zeros(shape, dtype=torch.long, device="cpu") for n, shape in others.items()}
        if others and self.run({}) is None:
            coins = {n: torch.randint(0, 2, shape, generator=draws, device="cpu") for n, shape in others.items()}
            self.others = {n: coin.bool() for n, coin in coins.items()}

    def run(self, changed: Mapping[int, Tensor]) -> list[Tensor] | None:
        """The floating-point tensors that the call makes; None where it does not take these numbers."""
        values = {number: x.clone() for number, x in (self.values | self.others | dict(changed)).items()}
        try:
            args, kwargs = self.step.called(values, self.shapes)
            made: Any = self.step.func(*args, **kwargs)
        except CALL_ERRORS:
            return None
        wanted = set(self.step.outputs)
        return [x.float() for n, x in zip(self.step.makes, tensors_of(made), strict=True) if n in wanted]
