"""Which rows of a model's values are padding: the positions where an attention mask is zero, or a padding mask is not,
followed by their axes.

Sequences are padded to one length to go into a batch, and what a model computes there depends on nothing that anybody
asked for. So rows under padding count neither in ranges nor in Hessians, and results do not change with the length
that sequences are padded to. Where a value has its samples and positions is read off the sizes of two recordings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from quantkit.program.inputs import Batch, picked_samples
from quantkit.program.intercept import OpKey, change_inputs, forward_parameters, read_place, tensors_of
from quantkit.program.program import Program

MASKS = ("decoder_attention_mask", "attention_mask")  # where a model takes both, its output belongs to the decoder
PADDING_MASK = "padding_mask"  # how names end, in torch's own modules too, of masks that mark padding, not data
Argument = tuple[str, int | None]  # its name, and its position among the positional arguments
Sizes = tuple[int, int]  # in both recordings
Given = Mapping[int, Tensor]  # the masks of a batch, by their numbers in the program


def as_rows(x: Tensor) -> Tensor:
    """(rows, channels) of a tensor with its channels last."""
    return x.reshape(-1, x.shape[-1])


def mask_arguments(model: nn.Module) -> list[Argument]:
    """The masks that a forward takes; one that names none may take an attention mask by keyword all the same."""
    names = [parameter.name for parameter in forward_parameters(model)]
    known = [*(name for name in MASKS if name in names), *(name for name in names if name.endswith(PADDING_MASK))]
    return [(name, names.index(name)) for name in known] or [(MASKS[-1], None)]


def mask_of(batch: Batch, mask: Argument) -> Tensor | None:
    """The mask of a batch, if it has one for each position (samples, positions) and not one to be added."""
    (args, kwargs), (name, position) = batch, mask
    given = kwargs.get(name, args[position] if position is not None and position < len(args) else None)
    usable = isinstance(given, Tensor) and given.dim() == 2 and not bool((given < 0).any())
    return given if usable else None


def live_positions(given: Tensor, mask: Argument) -> Tensor:
    """Booleans (samples, positions), false where a mask says that there is padding."""
    return given == 0 if mask[0].endswith(PADDING_MASK) else given != 0


def are_padded(model: nn.Module, batches: Sequence[Batch]) -> bool:
    """Whether masks say that some positions are padding."""
    return any(not bool(mask.all()) for batch in batches for mask in masks_of(model, batch))


def masks_of(model: nn.Module, batch: Batch) -> list[Tensor]:
    """The masks of a batch as booleans (samples, positions), false where there is padding."""
    given = ((mask_of(batch, mask), mask) for mask in mask_arguments(model))
    return [live_positions(x, mask) for x, mask in given if x is not None]


def padded_first(model: nn.Module, batches: Sequence[Batch]) -> Batch:
    """The first batch with padding in it, and in it the samples with most of it first; else the first batch.

    A model may take another path where a mask hides nothing, as those of transformers do: what is recorded there does
    not read the mask.
    """
    for batch in batches:
        masks = masks_of(model, batch)
        if not all(bool(mask.all()) for mask in masks):
            hidden = sum((mask.logical_not().sum(1) for mask in masks), torch.zeros((), dtype=torch.long))
            return picked_samples(batch, hidden.argsort(descending=True, stable=True))
    return batches[0]


@dataclass(frozen=True)
class _Axes:
    """Where a value has samples and positions: the axis of the samples, each of which has ``times`` rows (as heads
    are), and those of the positions; or the axis of both, where they are in one.
    """

    positions: tuple[int, ...]
    samples: int | None = None
    times: int = 1
    both: int | None = None

    def live(self, mask: Tensor, dims: int) -> Tensor:
        """``mask`` (samples, positions), booleans, in a shape that goes with the value's."""
        if self.both is not None:
            return _along(mask.reshape(-1), (self.both,), dims)
        if self.samples is None:  # the same for all samples
            views = [_along(mask.any(0), (axis,), dims) for axis in self.positions]
        else:
            rows = mask.repeat_interleave(self.times, 0)
            views = [_along(rows, (self.samples, axis), dims) for axis in self.positions]
        found = views[0]
        for view in views[1:]:
            found = found & view
        return found


def _along(x: Tensor, axes: Sequence[int], dims: int) -> Tensor:
    """A tensor whose axes become these of ``dims``, the others of size 1."""
    ordered = x.permute(sorted(range(len(axes)), key=axes.__getitem__))
    sizes = iter(ordered.shape)
    return ordered.reshape([next(sizes) if axis in axes else 1 for axis in range(dims)])


@dataclass(frozen=True)
class Padding:
    """The padding of a model's values. ``program`` stands for the model at two sizes, ``masks`` are the numbers of its
    inputs that are masks, with the arguments they are passed as.
    """

    program: Program
    masks: Mapping[int, Argument]

    @classmethod
    def of(cls, program: Program, model: nn.Module, batch: Batch) -> Padding | None:
        """The padding by the masks in a batch; None where the recordings do not tell samples and positions apart."""
        ordered = change_inputs(model, *batch, lambda _, tensor: tensor)
        numbers = {id(x): number for x, number in zip(tensors_of(ordered), program.inputs, strict=True)}
        given = ((mask, mask_of(ordered, mask)) for mask in mask_arguments(model))
        found = {numbers[id(x)]: mask for mask, x in given if x is not None}
        known = {number: mask for number, mask in found.items() if _told_apart(*_sizes(program, number))}
        return cls(program, known) if known else None

    def given(self, batch: Batch) -> Given:
        """The masks of a batch."""
        given = ((number, mask_of(batch, mask)) for number, mask in self.masks.items())
        return {number: mask for number, mask in given if mask is not None}

    @cached_property
    def places(self) -> dict[OpKey, int]:
        """Where a quantizer may be -> the number of the value there."""
        read = {read_place(step.key): step.inputs[0] for step in self.program.steps if step.inputs}
        return {place: number for number, place in self.program.producer.items()} | read

    def live(self, number: int, x: Tensor, given: Given) -> Tensor | None:
        """Booleans that go with a value's shape, false under padding; None where nothing of it is."""
        for mask_number, axes in self._axes(number):
            if mask_number not in given:
                continue
            mask = live_positions(given[mask_number], self.masks[mask_number])
            if mask.all():
                continue
            live = axes.live(mask, x.dim())
            if all(own in (1, size) for own, size in zip(live.shape, x.shape, strict=True)):
                return live.to(x.device)
        return None

    def kept(self, number: int, x: Tensor, given: Given) -> Tensor:
        """The elements of a value that are no padding, all of it where nothing is."""
        live = self.live(number, x, given)
        return x if live is None else x[live.expand_as(x)]

    def rows_of(self, number: int, given: Given) -> Callable[[Tensor], Tensor]:
        """A function that gives (rows, channels) of a value with its channels last, without those that are padding."""

        def rows_of(x: Tensor) -> Tensor:
            live = self.live(number, x, given)
            rows = as_rows(x)
            if live is None or live.shape[-1] != 1:  # positions in the place of channels: each row has some
                return rows
            return rows[live.expand(*x.shape[:-1], 1).reshape(-1)]

        return rows_of

    def _axes(self, number: int) -> Iterator[tuple[int, _Axes]]:
        for mask in self.masks:
            axes = _axes_of(_sizes(self.program, number), *_sizes(self.program, mask))
            if axes is not None:
                yield mask, axes


def _sizes(program: Program, number: int) -> tuple[Sizes, ...]:
    """The sizes of a value along its axes, in both recordings; none where the second did not make it."""
    other = program.second_shape.get(number, ())
    return tuple(zip(program.shape[number], other, strict=False))


def _told_apart(*sizes: Sizes) -> bool:
    """Whether the sizes of a mask, its samples and its positions, differ between both recordings."""
    return len(sizes) == 2 and all(here != there for here, there in sizes)


def _axes_of(sizes: Sequence[Sizes], samples: Sizes, positions: Sizes) -> _Axes | None:
    """Where a value of these sizes has positions; None where it has none."""
    both = (samples[0] * positions[0], samples[1] * positions[1])
    if both in sizes:
        return _Axes((), both=sizes.index(both))
    where = tuple(axis for axis, found in enumerate(sizes) if found == positions)
    if not where:
        return None
    for axis, (here, there) in enumerate(sizes):
        times = here // samples[0]
        if times and (here, there) == (times * samples[0], times * samples[1]):
            return _Axes(where, axis, times)
    return _Axes(where)
