"""The one recording of a model: the torch calls of a forward in order, the values between them, the layers.

A value is a number, not a name: two uses of one tensor share it, an operation in place makes a new one, and a call
that returns its argument unchanged (dropout in eval mode, ``contiguous``) keeps it. Numbers that follow sizes are
recorded as expressions, so that a program can be replayed on other numbers of samples, other lengths and other image
sizes. A replay skips the user's code: it only stands for models whose calls do not depend on the values of their
inputs, which ``quantkit.program.replayable`` checks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.program.arguments import Ref, SizeRef, leaves_of, replaced, thawed
from quantkit.program.inputs import Batch
from quantkit.program.intercept import CALL_ERRORS, OpKey, change_inputs, map_tensors, read_place, tensors_of
from quantkit.program.layers import LayerCall, LayerWeight
from quantkit.program.sizes import Shapes
from quantkit.program.updates import named_state

Change = Callable[[OpKey, Tensor], Tensor]


@dataclass(frozen=True)
class Step:
    """One call: its function, its arguments with references for tensors and sizes, and the values it reads.

    ``makes`` has the number of every tensor in its result, ``outputs`` those of them that are floating-point and new.
    ``rewrites`` pairs the numbers of all values in memory that the call wrote to with their new ones. A ``constant``
    step depends on nothing that may change: a replay takes what it made as it is.
    """

    key: OpKey
    func: Callable[..., Any]
    args: Any
    kwargs: Any
    inputs: tuple[int, ...]
    makes: tuple[int, ...]
    outputs: tuple[int, ...]
    rewrites: tuple[tuple[int, int], ...] = ()
    constant: bool = False

    @property
    def reads(self) -> tuple[int, ...]:
        """All values that the step needs: those in its arguments, and those whose memory it writes to."""
        return (*self.inputs, *(old for old, _ in self.rewrites))

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The plain arguments, those that hold no tensor: of a number that follows sizes, its reference."""
        given = (*self.args, *self.kwargs.values())
        return tuple(a for a in given if not any(isinstance(leaf, Ref) for leaf in leaves_of(a)))

    def sizes(self) -> set[int]:
        """The values whose shapes the arguments follow."""
        leaves = leaves_of((self.args, self.kwargs))
        return {n for leaf in leaves if isinstance(leaf, SizeRef) for n in leaf.expression.numbers()}

    def called(self, values: Mapping[int, Tensor], shapes: Shapes) -> tuple[Any, Any]:
        """The arguments of the call, given the values it reads and the shapes it follows."""
        return thawed(self.args, values, shapes), thawed(self.kwargs, values, shapes)


@dataclass(frozen=True)
class Program:
    """What a model computes, recorded on ``size`` samples.

    ``dtypes`` are those of the inputs. ``producer`` maps a floating-point value to the place that made it, model
    inputs included; parameters have none, nor has what was written through a view or made where no torch call is seen.
    ``shape`` keeps the batch dimension. ``calls`` are those of the layers, in execution order, ``weights`` says where
    each layer's weight is, called or not, and ``kinds`` what it is. ``stored`` names the values of parameters and
    buffers, ``constants`` holds every other tensor that is read and not made; ``varying`` are the values that depend
    on the model's inputs, ``floating`` those of floating-point tensors, ``rows`` maps values with one row per sample
    to the axis of the samples, ``second_shape`` to their shapes in a second recording, at other sizes. ``updated`` are
    the tensors that a forward leaves changed in the model.
    ``channels_last``: whether a replay may use that layout. ``output`` is the one of ``outputs`` that is the model's
    answer, ``output_names`` are the names of all of them.
    """

    size: int
    steps: tuple[Step, ...]
    inputs: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    outputs: tuple[int, ...]
    producer: dict[int, OpKey]
    shape: dict[int, tuple[int, ...]]
    calls: dict[str, tuple[LayerCall, ...]]
    kinds: dict[str, str]
    weights: dict[str, LayerWeight]
    stored: dict[str, int]
    constants: dict[int, Tensor]
    varying: frozenset[int]
    floating: frozenset[int]
    updated: tuple[str, ...] = ()
    rows: Mapping[int, int] = field(default_factory=dict)
    second_shape: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    channels_last: bool = True
    output: int = -1
    output_names: tuple[str, ...] = ()

    @cached_property
    def makers(self) -> dict[int, Step]:
        """Value -> the step that made it."""
        return {value: step for step in self.steps for value in step.outputs}

    @cached_property
    def consumers(self) -> dict[int, tuple[Step, ...]]:
        """Value -> the steps that read it, once per use."""
        found: dict[int, list[Step]] = {}
        for step in self.steps:
            for value in step.inputs:
                found.setdefault(value, []).append(step)
        return {value: tuple(steps) for value, steps in found.items()}

    def depending_on(self, numbers: Iterable[int]) -> set[int]:
        """These values, and all that were computed from some of them."""
        found = set(numbers)
        for step in self.steps:
            if not found.isdisjoint(step.inputs):
                found.update(step.makes, (new for _, new in step.rewrites))
        return found

    @property
    def decides_by_values(self) -> bool:
        """Whether values that depend on the model's inputs left torch, where the model's code may decide by them."""
        read_out = (step for step in self.steps if not step.makes and not step.rewrites)
        return any(not self.varying.isdisjoint(step.inputs) for step in read_out)

    @cached_property
    def layer_of(self) -> dict[OpKey, str]:
        """Key of a call -> the layer that it is a run of, the first of several."""
        return {call.key: name for name, calls in reversed(self.calls.items()) for call in calls}

    @cached_property
    def names(self) -> dict[int, str]:
        """Value -> the parameter or buffer it is, of several names the first."""
        return {number: name for name, number in reversed(self.stored.items())}

    @cached_property
    def sized(self) -> frozenset[int]:
        """The values whose shapes other calls follow."""
        return frozenset(number for step in self.steps if not step.constant for number in step.sizes())

    @cached_property
    def written(self) -> frozenset[int]:
        """The values that are there before the first step and are written to."""
        olds = {old for step in self.steps if not step.constant for old, _ in step.rewrites}
        return frozenset(olds & (set(self.names) | set(self.constants)))

    def alive_at(self, start: int) -> list[int]:
        """The values that are made before a step and read at or after it."""
        made = {*self.inputs}
        for step in self.steps[:start]:
            if not step.constant:
                made.update(step.makes, (new for _, new in step.rewrites))
        read = {n for step in self.steps[start:] if not step.constant for n in step.reads}
        return sorted(made & (read | set(self.outputs)))

    def last_reads(self, start: int, stop: int) -> dict[int, int]:
        """Value -> the last of these steps that reads it."""
        steps = enumerate(self.steps[start:stop], start)
        return {number: i for i, step in steps if not step.constant for number in step.reads}

    def first_use(self, weight: LayerWeight) -> int:
        """The position of the first step that reads a layer's weight, or the parameter that holds it."""
        numbers = set(weight.numbers) if weight.parameter is None else {self.stored[weight.parameter]}
        return next((i for i, step in enumerate(self.steps) if numbers & set(step.reads)), 0)

    def laid_out(self, x: Tensor) -> Tensor:
        """A tensor in the memory layout that is quickest: images with channels last, which convolutions prefer, unless
        the model's code depends on the layout (``view`` does).
        """
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last and x.dim() == 4 else x

    def names_read(self, start: int, stop: int, wanted: Sequence[int] = ()) -> set[str]:
        """The parameters and buffers that some steps read, or that are ``wanted`` themselves."""
        read = {n for step in self.steps[start:stop] if not step.constant for n in step.reads}
        return {self.names[number] for number in (*read, *wanted) if number in self.names}

    def state_of(self, model: nn.Module) -> dict[str, Tensor]:
        """The parameters and buffers of the model by all their names, detached and laid out."""
        return {name: self.laid_out(tensor.detach()) for name, tensor in named_state(model).items()}

    def entering(self, model: nn.Module, batch: Batch) -> dict[int, Tensor]:
        """The values a batch of inputs starts a replay with: copies, as calls may work in place."""
        given = change_inputs(model, *batch, lambda _, tensor: tensor)
        return dict(zip(self.inputs, map(self.laid_out, tensors_of(given)), strict=True))

    def replay(
        self,
        values: Mapping[int, Tensor],
        state: Mapping[str, Tensor],
        wanted: Sequence[int],
        change: Change | None = None,
        part: Part | None = None,
    ) -> list[Tensor]:
        """Run the steps of ``part`` (default all) from these values; returns the values of the numbers ``wanted``.

        ``state`` has the parameters by name, and by number, as text, what takes the place of computed weights;
        ``change(place, tensor)`` is applied to what every step makes and to what it reads first. A value is dropped
        after its last use.
        """
        run = _Run(self, state, change, part or Part(0, len(self.steps)))
        return run.values_of(values, wanted)

    def shape_at(self, number: int, samples: int) -> tuple[int, ...]:
        """The shape of a value for so many samples, as far as it is known without running anything."""
        axis = self.rows.get(number)
        return tuple(samples if i == axis else size for i, size in enumerate(self.shape[number]))

    def shapes_at(self, inputs: Shapes, state: Mapping[str, Tensor]) -> Shapes:
        """The shapes that calls follow, for inputs of these shapes: on tensors that hold nothing where all calls take
        such, else by computing.
        """
        for device in ("meta", next((x.device.type for x in state.values()), "cpu")):
            shapes: dict[int, tuple[int, ...]] = {}
            entering = {
                number: torch.zeros(inputs[number], dtype=dtype, device=device)
                for number, dtype in zip(self.inputs, self.dtypes, strict=True)
            }
            moved = replace(
                self,
                steps=tuple(_on_device(step, device) for step in self.steps),
                constants={number: x.to(device) for number, x in self.constants.items()},
            )
            part = Part(0, len(self.steps), shapes)
            try:
                with torch.no_grad():
                    _Run(moved, {n: x.to(device) for n, x in state.items()}, None, part).values_of(entering, [])
                break
            except CALL_ERRORS:  # a call that needs values, or has no form without them
                if device != "meta":
                    raise
        return shapes


def _on_device(step: Step, device: str) -> Step:
    """A step with every device in its arguments replaced, for what it creates to be there."""
    args, kwargs = replaced(
        (step.args, step.kwargs), lambda leaf: torch.device(device) if isinstance(leaf, torch.device) else leaf
    )
    return replace(step, args=args, kwargs=kwargs)


@dataclass(frozen=True)
class Part:
    """Steps ``start`` to ``stop`` of a program. ``shapes`` are those that its calls follow and that are known before;
    what becomes known is added.
    """

    start: int
    stop: int
    shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)


class _Run:
    """One replay: the values that are alive."""

    def __init__(self, program: Program, state: Mapping[str, Tensor], change: Change | None, part: Part) -> None:
        self.program, self.state, self.change, self.part = program, state, change, part
        self.alive: dict[int, Tensor] = {}
        self.shapes = part.shapes
        self.replaced = {int(name): x for name, x in state.items() if name.isdigit()}

    def values_of(self, values: Mapping[int, Tensor], wanted: Sequence[int]) -> list[Tensor]:
        for number, value in values.items():
            self._set(number, value)
        last, kept = self.program.last_reads(self.part.start, self.part.stop), set(wanted)
        for i in range(self.part.start, self.part.stop):
            step = self.program.steps[i]
            if step.constant or not (step.makes or step.rewrites):
                continue
            self._take(step)
            for number in (*step.inputs, *step.makes):
                if last.get(number, i) <= i and number not in kept:
                    self.alive.pop(number, None)
        return [self._value(number) for number in wanted]

    def _take(self, step: Step) -> None:
        read = {number: self._value(number) for number in step.inputs}
        if self.change is not None and step.inputs:
            read[step.inputs[0]] = self.change(read_place(step.key), read[step.inputs[0]])
        args, kwargs = step.called(read, self.shapes)
        made = step.func(*args, **kwargs)
        if self.change is not None:
            made = self._changed(step, made)
        for old, new in step.rewrites:
            if old in read or old in self.alive:
                self._set(new, read[old] if old in read else self.alive[old])
        for number, tensor in zip(step.makes, tensors_of(made), strict=True):
            self._set(number, tensor)

    def _changed(self, step: Step, made: Any) -> Any:
        assert self.change is not None
        changed = map_tensors(made, step.key, self.change)
        others = len(step.rewrites) > 1 and isinstance(made, Tensor) and changed is not made
        if others and not made.requires_grad:
            made.copy_(changed)  # other views of this memory must see its codes too
        return changed

    def _set(self, number: int, tensor: Tensor) -> None:
        self.alive[number] = self.replaced.get(number, tensor)
        if number in self.program.sized:
            self.shapes[number] = tuple(tensor.shape)

    def _value(self, number: int) -> Tensor:
        if number in self.alive:
            return self.alive[number]
        name = self.program.names.get(number)
        found = self.program.constants[number] if name is None else self.state[name]
        if number in self.program.written:  # the model's own stays as it is
            found = self.alive[number] = found.clone()
        return found
