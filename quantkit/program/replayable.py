"""Whether a program stands for its model: recorded at other sizes, and replayed there.

A second recording, on another number of samples and where inputs are tokens at another length, tells which values have
a row per sample, and the numbers that the first one took for constants although they follow a size: those that lost
their expression in the model's code, as ``len(x)`` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from quantkit.errors import InvalidRequest
from quantkit.program.arguments import SizeRef, leaves_of, replaced
from quantkit.program.inputs import Batch, batch_size, picked_samples
from quantkit.program.intercept import CALL_ERRORS, tensors_of
from quantkit.program.outputs import results_of
from quantkit.program.padding import masks_of
from quantkit.program.program import Part, Program, Step
from quantkit.program.record import record, run_model
from quantkit.program.sizes import Extent
from quantkit.program.trial import close
from quantkit.program.updates import plain_mode

CLOSE = 1e-3  # of the largest output: replaying repeats the same sums, but kernels may order them differently


def replayable(program: Program, model: nn.Module, batch: Batch, others: Sequence[Batch]) -> Program | None:
    """The program of ``model``, recorded on ``batch``, with what recording it at other sizes tells; None where a
    replay does not compute what the model computes: on the batch, on ``others``, at those sizes.
    """
    for other in _other_batches(model, batch):
        try:
            second = record(model, other)
        except InvalidRequest:  # a model that takes these sizes only
            continue
        if [step.key for step in second.steps] != [step.key for step in program.steps]:
            continue
        learned = _compared(program, second)
        for candidate in (learned, replace(learned, channels_last=False)):
            if all(_agrees(candidate, model, one) for one in (other, batch, *others)):
                return candidate
    return None


def _other_batches(model: nn.Module, batch: Batch) -> Iterator[Batch]:
    """The batch with another number of samples; first with other lengths of tokens, vectors or signals, or sizes of
    images, too.
    """
    size = batch_size(batch)
    few = 3 if size == 2 else 2
    resized = picked_samples(batch, torch.arange(few, device="cpu") % size)
    tensors = tensors_of(batch)
    tokens = {n for t in tensors if not t.is_floating_point() and t.dim() > 1 for n in t.shape[1:] if n > 2}
    sides = {n for t in tensors if t.is_floating_point() and t.dim() == 4 for n in t.shape[2:] if n > 3}
    vectors = [t.shape for t in tensors if t.is_floating_point() and t.dim() == 3]
    steps, channels_first = ({shape[axis] for shape in vectors if shape[axis] > 2} for axis in (1, 2))
    masks = {mask.shape[1]: mask for mask in masks_of(model, resized)}
    lengths, *fewer = ({n: _without_one(n, masks.get(n)) for n in sizes} for sizes in (tokens, steps, channels_first))
    larger = {n: torch.arange(n + n // 2, device="cpu") % n for n in sides}
    for changed in (lengths, larger, *fewer):
        if changed:
            yield tree_map(lambda value, sizes=changed: _resized(value, sizes), resized)
    yield resized
    yield batch  # rows cannot be told from it, but sizes may be followed all the same


def _without_one(length: int, mask: Tensor | None) -> Tensor:
    """All positions but the last, or where a mask hides some, but one that it does not: so it goes on to hide some."""
    places = torch.arange(length, device="cpu")
    dropped = length - 1 if mask is None or bool(mask.all()) else int(mask.sum(0).argmax())
    return places[places != dropped]


def _resized(value: Any, places: Mapping[int, Tensor]) -> Any:
    """A tensor with other positions along axes of these sizes, behind its first axis."""
    if isinstance(value, Tensor):
        for axis in range(1, value.dim()):
            if (chosen := places.get(value.shape[axis])) is not None:
                value = value.index_select(axis, chosen.to(value.device))
    return value


def _compared(program: Program, second: Program) -> Program:
    pairs = list(zip(program.inputs, second.inputs, strict=True))
    for one, two in zip(program.steps, second.steps, strict=True):
        pairs.extend(zip(one.makes, two.makes, strict=False))
        pairs.extend((new, other) for (_, new), (_, other) in zip(one.rewrites, two.rewrites, strict=False))
    sizes = (program.size, second.size)
    axes = ((n, _axis_of(sizes, program.shape[n], second.shape[m])) for n, m in pairs)
    rows = {n: axis for n, axis in axes if axis is not None and sizes[0] != sizes[1]}

    known = _Extents(program, second, pairs)
    steps, anew = [], set[int]()
    for one, two in zip(program.steps, second.steps, strict=True):
        step = known.explained(one, two)
        step = replace(step, constant=step.constant and anew.isdisjoint(step.inputs))
        if one.constant and not step.constant:
            anew.update(step.makes)
        steps.append(step)
    shapes = {n: second.shape[m] for n, m in pairs}
    return replace(program, rows=rows, second_shape=shapes, steps=tuple(steps))


def _axis_of(sizes: tuple[int, int], shape: tuple[int, ...], other: tuple[int, ...]) -> int | None:
    """The first axis along which two values have as many elements as there were samples."""
    return next((axis for axis, found in enumerate(zip(shape, other, strict=False)) if found == sizes), None)


class _Extents:
    """The sizes of values that differ between two recordings."""

    def __init__(self, program: Program, second: Program, pairs: Sequence[tuple[int, int]]) -> None:
        self.by_sizes: dict[tuple[int, int], Extent] = {}
        for n, m in pairs:
            if n in program.varying:
                for axis, sizes in enumerate(zip(program.shape[n], second.shape[m], strict=False)):
                    if sizes[0] != sizes[1]:
                        self.by_sizes.setdefault(sizes, Extent(n, axis))

    def explained(self, one: Step, two: Step) -> Step:
        """A step with references for whole numbers that differ between both recordings as some size does."""
        others = list(leaves_of((two.args, two.kwargs)))
        position = iter(range(len(others)))

        def explain(leaf: Any) -> Any:
            other = others[next(position)]
            whole = type(leaf) is int and type(other) is int and leaf != other
            extent = self.by_sizes.get((leaf, other)) if whole else None
            return leaf if extent is None else SizeRef(extent)

        if len(others) != len(list(leaves_of((one.args, one.kwargs)))):
            return one
        args, kwargs = replaced((one.args, one.kwargs), explain)
        return replace(
            one, args=args, kwargs=kwargs, constant=one.constant and args is one.args and kwargs == one.kwargs
        )


def _agrees(program: Program, model: nn.Module, batch: Batch) -> bool:
    """Whether a replay gives what the model gives, and whether the shapes that its calls follow are known without the
    values of the inputs, as a replay from somewhere inside needs them.
    """
    part = Part(0, len(program.steps))
    with plain_mode(model):
        try:
            wanted = results_of(run_model(model, batch))
            entering, state = program.entering(model, batch), program.state_of(model)
            shapes = {number: tuple(x.shape) for number, x in entering.items()}
            found = program.replay(entering, state, program.outputs, part=part)
            foreseen = program.shapes_at(shapes, state) if program.sized else {}
        except CALL_ERRORS:
            # a tensor that no traced call made, a fixed shape or count, a step that needs values; or some samples that
            # the model does not take alone, as a graph without a part of its nodes
            return False
    return foreseen == part.shapes and all(close(one, other, CLOSE) for one, other in zip(found, wanted, strict=True))


def computed_weights(model: nn.Module, program: Program) -> dict[str, Tensor]:
    """The weights of the layers that no parameter holds, output channels first, as the model computes them."""
    found = {}
    for name, weight in program.weights.items():
        if weight.parameter is None:
            steps = _making(program, weight.numbers[0])
            alone = replace(program, steps=tuple(program.steps[i] for i in steps), channels_last=False)
            with plain_mode(model):
                (operand,) = alone.replay({}, alone.state_of(model), weight.numbers[:1])
            found[name] = operand.detach().permute(weight.order or tuple(range(operand.dim()))).reshape(weight.shape)
    return found


def _making(program: Program, number: int) -> list[int]:
    """The positions of the steps that a value takes."""
    wanted, steps = {number}, []
    for i, step in reversed(list(enumerate(program.steps))):
        made = {*step.makes, *(new for _, new in step.rewrites)}
        if not step.constant and made & wanted:
            steps.append(i)
            wanted |= {*step.inputs, *(old for old, _ in step.rewrites)}
    return steps[::-1]
