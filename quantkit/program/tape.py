"""A forward written down as a list of calls, to be replayed from the middle: what block-wise work runs on.

A tape holds for one batch size: whatever the model's code computed from the number of samples is part of it. It skips
the user's code, so it only stands for models whose calls do not depend on the values of their inputs; ``record`` plays
it on other inputs and gives up where the outputs differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from quantkit.program.inputs import Batch, batch_size
from quantkit.program.intercept import (
    INPUT,
    OpKey,
    change_inputs,
    intercept,
    map_tensors,
    own_inputs,
    read_place,
    tensors_of,
)
from quantkit.program.layers import layer_kind

Change = Callable[[OpKey, Tensor], Tensor]
_WRITES = ("setitem",)  # what changes a tensor and returns nothing
_CLOSE = 1e-3  # of the largest output: replaying repeats the same sums, but kernels may order them differently


@dataclass(frozen=True)
class Ref:
    """Stands for a tensor in the arguments of a step."""

    number: int


def _is_ref(value: Any) -> bool:
    return isinstance(value, Ref)


@dataclass(frozen=True)
class Step:
    """One call: its function with ``Ref``s for tensors, the numbers it reads, and those of the tensors it returns."""

    key: OpKey
    func: Callable[..., Any]
    args: Any
    kwargs: Any
    reads: tuple[int, ...]
    makes: tuple[int, ...]

    def arguments(self, values: Mapping[int, Tensor]) -> tuple[Any, Any]:
        """The arguments of the call, given the values it reads by number."""

        def resolve(leaf: Any) -> Any:
            return values[leaf.number] if isinstance(leaf, Ref) else leaf

        found: tuple[Any, Any] = tree_map(resolve, (self.args, self.kwargs), is_leaf=_is_ref)
        return found


@dataclass(frozen=True)
class Tape:
    """The steps of a forward on ``size`` samples that depend on its inputs or parameters.

    ``inputs`` are the numbers of the model's input tensors, ``output`` that of the tensor it is asked for; ``state``
    names the parameters and buffers read, ``constants`` holds every other tensor that is read and not made;
    ``floating`` are the numbers of floating-point tensors, ``rows`` those of tensors with one row per sample;
    ``channels_last``: whether it may run in that layout.
    """

    size: int
    steps: tuple[Step, ...]
    inputs: tuple[int, ...]
    output: int
    state: dict[int, str]
    constants: dict[int, Tensor]
    floating: frozenset[int]
    rows: frozenset[int]
    channels_last: bool = True

    def laid_out(self, x: Tensor) -> Tensor:
        """A tensor in the memory layout that is quickest: images with channels last, which convolutions prefer, unless
        the model's code depends on the layout (``view`` does).
        """
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last and x.dim() == 4 else x

    def state_of(self, model: nn.Module) -> dict[str, Tensor]:
        """The parameters and buffers of the model by all their names, detached and laid out."""
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        return {name: self.laid_out(tensor.detach()) for name, tensor in named}

    def replay(
        self,
        values: Mapping[int, Tensor],
        state: Mapping[str, Tensor],
        wanted: Sequence[int],
        change: Change | None = None,
        span: tuple[int, int] | None = None,
    ) -> list[Tensor]:
        """Run the steps of ``span`` (default all) from these values; returns the values of the numbers ``wanted``.

        ``state`` has the parameters by name; ``change(place, tensor)`` is applied to what every step makes and to what
        it reads first. A value is dropped after its last use.
        """
        start, stop = span or (0, len(self.steps))
        kept = dict(values)
        last = self.last_uses(start, stop)
        for i in range(start, stop):
            step = self.steps[i]
            found = {number: self._value(number, kept, state) for number in step.reads}
            if change is not None and step.reads:
                found[step.reads[0]] = change(read_place(step.key), found[step.reads[0]])
            args, kwargs = step.arguments(found)
            made = step.func(*args, **kwargs)
            if change is not None:
                made = map_tensors(made, step.key, change)
            kept.update(zip(step.makes, tensors_of(made), strict=True))
            for number in (*step.reads, *step.makes):
                if last.get(number, i) <= i and number not in wanted:
                    kept.pop(number, None)
        return [self._value(number, kept, state) for number in wanted]

    def _value(self, number: int, values: Mapping[int, Tensor], state: Mapping[str, Tensor]) -> Tensor:
        if number in values:
            return values[number]
        return state[self.state[number]] if number in self.state else self.constants[number]

    def last_uses(self, start: int, stop: int) -> dict[int, int]:
        """Number -> the last step between ``start`` and ``stop`` that reads it."""
        return {number: i for i in range(start, stop) for number in self.steps[i].reads}

    def entering(self, model: nn.Module, batch: Batch) -> dict[int, Tensor]:
        """The values a batch of inputs starts a replay with: copies, as calls may work in place."""
        given = change_inputs(model, *batch, lambda _, tensor: tensor)
        return dict(zip(self.inputs, map(self.laid_out, tensors_of(given)), strict=True))

    def places(self) -> dict[int, OpKey]:
        """Number -> the place that last made this value; a model input that nothing overwrites is an input place."""
        found = {number: replace(INPUT, output=i) for i, number in enumerate(self.inputs)}
        for step in self.steps:
            found |= {number: replace(step.key, output=i) for i, number in enumerate(step.makes)}
        return found

    def lone_values(self) -> dict[int, int]:
        """Step -> the one value, a row per sample, that everything after it is computed from: where a forward can be
        cut in two.
        """
        last = self.last_uses(0, len(self.steps)) | {self.output: len(self.steps)}
        live = set(self.inputs)
        found = {}
        for i, step in enumerate(self.steps):
            live = {number for number in (*live, *step.makes) if last.get(number, -1) > i}
            if len(live) == 1 and live <= self.floating & self.rows:
                found[i] = next(iter(live))
        return found


@dataclass
class _Recorder:
    """Writes calls down while a model runs. Every tensor seen is held, so that its address stays its own."""

    state: dict[int, str]
    numbers: dict[int, int] = field(default_factory=dict)
    held: list[Tensor] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    varying: set[int] = field(default_factory=set)

    def number(self, tensor: Tensor) -> int:
        if id(tensor) not in self.numbers:
            self.numbers[id(tensor)] = len(self.held)
            self.held.append(tensor)
        return self.numbers[id(tensor)]

    def __call__(self, key: OpKey, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        reads = [self.number(t) for t in tensors_of((args, kwargs))]
        leaves, spec = tree_flatten((args, kwargs))
        refs = [Ref(self.number(leaf)) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        result = func(*args, **kwargs)
        makes = [self.number(t) for t in tensors_of(result)]
        depends = any(n in self.varying or id(self.held[n]) in self.state for n in reads)
        if depends and (makes or key.op in _WRITES):
            own_args, own_kwargs = tree_unflatten(refs, spec)
            self.steps.append(Step(key, func, own_args, own_kwargs, tuple(reads), tuple(makes)))
            self.varying.update(makes)
        return result


def record(model: nn.Module, batch: Batch, other: Batch, output: Callable[[Any], Tensor]) -> Tape | None:
    """The tape of ``model`` (in eval mode) on the samples of ``batch``, up to the tensor that ``output`` picks from
    what the model returns; None where that does not have a row per sample, or where replaying it does not compute what
    the model computes, on ``batch`` or on ``other``, which has the same number of samples.
    """
    recorder, inputs, result = _recorded(model, batch)
    main = recorder.number(output(result))
    named = {n: recorder.state[id(t)] for n, t in enumerate(recorder.held) if id(t) in recorder.state}
    made = {n for step in recorder.steps for n in step.makes} | set(inputs) | set(named)
    rows = _with_samples_first(model, batch, recorder, inputs)
    tape = Tape(
        size=batch_size(batch),
        steps=tuple(recorder.steps),
        inputs=tuple(inputs),
        output=main,
        state=named,
        constants={n: recorder.held[n] for step in recorder.steps for n in step.reads if n not in made},
        floating=frozenset(n for n, t in enumerate(recorder.held) if t.is_floating_point()),
        rows=rows,
    )
    if main not in rows or main not in {n for step in tape.steps for n in step.makes}:
        return None
    for candidate in (tape, replace(tape, channels_last=False)):
        if all(_replays(candidate, model, one, output) for one in (batch, other)):
            return candidate
    return None


def _recorded(model: nn.Module, batch: Batch) -> tuple[_Recorder, list[int], Any]:
    """(the calls of a forward, the numbers of its inputs, what the model returns)."""
    recorder = _Recorder(_names(model))
    args, kwargs = change_inputs(model, *batch, lambda _, tensor: tensor)
    inputs = [recorder.number(tensor) for tensor in tensors_of((args, kwargs))]
    recorder.varying.update(inputs)
    with torch.no_grad(), intercept(model, recorder):
        result = model(*args, **kwargs)
    return recorder, inputs, result


def _with_samples_first(model: nn.Module, batch: Batch, recorder: _Recorder, inputs: Sequence[int]) -> frozenset[int]:
    """The numbers of what was recorded on ``batch`` whose first dimension is the samples: it has another length on
    other numbers of them. None at all where the model's calls are others there.
    """
    size = batch_size(batch)
    few = 3 if size == 2 else 2
    indices = torch.arange(few) % size
    try:
        other, others, _ = _recorded(model, tree_map(lambda v: v[indices] if _of_samples(v, size) else v, batch))
    except (RuntimeError, ValueError, AssertionError):  # a model that takes one batch size only
        return frozenset()
    if [step.key for step in other.steps] != [step.key for step in recorder.steps]:
        return frozenset()
    pairs = list(zip(inputs, others, strict=True))
    for one, two in zip(recorder.steps, other.steps, strict=True):
        pairs.extend(zip(one.makes, two.makes, strict=True))
    return frozenset(n for n, m in pairs if (_rows(recorder.held[n]), _rows(other.held[m])) == (size, few))


def _rows(tensor: Tensor) -> int:
    return len(tensor) if tensor.dim() else 0


def _of_samples(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and _rows(value) == size


def _names(model: nn.Module) -> dict[int, str]:
    """The name of each parameter and buffer, by identity. Of several names a layer's own counts: a plan knows a layer
    that is registered twice by the first of its names.
    """
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    found = {id(tensor): name for name, tensor in state.items()}
    for name, module in model.named_modules():
        if layer_kind(module) is not None:
            found |= {id(t): f"{name}.{key}" for key, t in module.named_parameters(recurse=False)}
    return found


def _replays(tape: Tape, model: nn.Module, batch: Batch, output: Callable[[Any], Tensor]) -> bool:
    with torch.no_grad():
        args, kwargs = own_inputs(*batch)
        wanted = output(model(*args, **kwargs))
        try:
            (found,) = tape.replay(tape.entering(model, batch), tape.state_of(model), [tape.output])
        except (KeyError, RuntimeError):  # a tensor that no traced call made, or a shape fixed by the first batch
            return False
    return found.shape == wanted.shape and torch.allclose(
        found, wanted, rtol=0, atol=_CLOSE * float(wanted.abs().max()), equal_nan=True
    )
