"""What a model computes, found by running it once: operations in order, the tensors between them, the layers.

Tensors are numbered, not named: two uses of one tensor share a number, an in-place operation makes a new one, and a
call that returns its argument unchanged (eval-mode dropout, ``contiguous``) keeps it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakTensorKeyDictionary

from quantkit.errors import InvalidRequest, QuantkitError
from quantkit.program.inputs import Batch, batch_size
from quantkit.program.intercept import OpKey, change_inputs, intercept, own_inputs, tensors_of
from quantkit.program.layers import layer_kind, weight_of


@dataclass(frozen=True)
class Op:
    """One call: its key, the values it read and made, and its plain (non-tensor) arguments for later questions."""

    key: OpKey
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Call:
    """One run of a layer: the value it read, the value it made, and its multiply-accumulates per sample."""

    key: OpKey
    input: int
    output: int
    macs: int


@dataclass(frozen=True)
class Trace:
    """A model's operations in execution order and the values between them.

    ``producer`` maps a value to the place that made it, model inputs included; parameters have none, nor has what was
    written through a view or made where no torch call is seen. ``makers`` and ``consumers`` give the operation that
    made a value and those that read it (once per use). ``shape`` keeps the batch dimension. ``kinds`` names every
    layer, called or not, ``stored`` the values of parameters and buffers; ``varying`` are the values that depend on
    the model's inputs.
    """

    ops: tuple[Op, ...]
    producer: dict[int, OpKey]
    shape: dict[int, tuple[int, ...]]
    calls: dict[str, tuple[Call, ...]]
    outputs: tuple[int, ...]
    kinds: dict[str, str]
    makers: dict[int, Op]
    consumers: dict[int, tuple[Op, ...]]
    stored: dict[str, int]
    varying: frozenset[int]


# Calls that carry values out of torch, where they may decide anything.
_READ_OUT = frozenset(
    "item tolist numpy array bool int float complex index contains equal allclose is_nonzero".split()
)


class _Numbers:
    """Numbers for tensors: by identity, held weakly, so that a trace keeps no activation alive."""

    def __init__(self) -> None:
        self.of_tensor: Any = WeakTensorKeyDictionary()
        self.next = 0

    def new(self, tensor: Tensor) -> int:
        self.of_tensor[tensor] = self.next
        self.next += 1
        return self.next - 1

    def get(self, tensor: Tensor) -> int:
        number = self.of_tensor.get(tensor)
        return self.new(tensor) if number is None else number

    def overwritten(self, tensor: Tensor) -> list[int]:
        """New numbers for all tensors in the memory of one that was written to."""
        return [self.new(other) for other in list(self.of_tensor) if _memory(other) == _memory(tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)


def _state(tensor: Tensor) -> Any:
    """What changes when a tensor is written to: its version, or its values where inference mode counts none."""
    return tensor.clone() if tensor.is_inference() else tensor._version


def _written(tensor: Tensor, state: Any) -> bool:
    return not torch.equal(tensor, state) if isinstance(state, Tensor) else tensor._version != state


class _Recorder:
    """Collects operations while the model runs on ``samples`` samples."""

    def __init__(self, model: nn.Module, samples: int) -> None:
        self.samples = samples
        self.numbers = _Numbers()
        self.ops: list[Op] = []
        self.producer: dict[int, OpKey] = {}
        self.shape: dict[int, tuple[int, ...]] = {}
        self.calls: dict[str, list[Call]] = defaultdict(list)
        self.varying: set[int] = set()
        self.kinds = {name: kind for name, m in model.named_modules() if (kind := layer_kind(m)) is not None}
        self.weights = {name: weight_of(model, name) for name in self.kinds}
        state = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self.stored = {name: self.numbers.get(tensor) for name, tensor in state}

    def made(self, key: OpKey, tensor: Tensor, number: int) -> None:
        self.producer[number] = key
        self.shape[number] = tuple(tensor.shape)

    def record_input(self, key: OpKey, tensor: Tensor) -> Tensor:
        self.made(key, tensor, self.numbers.get(tensor))
        return tensor

    def __call__(self, key: OpKey, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        read = tensors_of((args, kwargs))
        inputs = tuple(self.numbers.get(t) for t in read)
        varies = not self.varying.isdisjoint(inputs)
        states = [_state(t) for t in read]
        result = func(*args, **kwargs)
        written = [t for t, state in zip(read, states, strict=True) if _written(t, state)]
        rewritten = [value for tensor in written for value in self.numbers.overwritten(tensor)]
        self.varying.update(rewritten if varies else ())
        kept = {id(t) for t in read} - {id(t) for t in written}  # a call may return its argument: the same value
        made = [(i, t) for i, t in enumerate(tensors_of(result)) if id(t) not in kept]
        outputs = tuple(self.number_results(key, made, varies))
        if made or written or (key.op in _READ_OUT and not isinstance(result, Tensor)):
            plain = tuple(a for a in (*args, *kwargs.values()) if not tensors_of(a))
            self.ops.append(Op(key, inputs, outputs, plain))
        if outputs:
            self.record_layer(key, args, kwargs, result, varies)
        return result

    def number_results(self, key: OpKey, made: list[tuple[int, Tensor]], varies: bool) -> Iterator[int]:
        """Number the tensors a call made; yields the numbers of those that hold floating-point values."""
        for position, tensor in made:
            value = self.numbers.new(tensor)
            if varies:
                self.varying.add(value)
            if tensor.is_floating_point():
                self.made(replace(key, output=position), tensor, value)
                yield value

    def record_layer(self, key: OpKey, args: Any, kwargs: Any, result: Any, varies: bool) -> None:
        kind = self.kinds.get(key.scope)
        if key.op != kind:
            return
        source = args[0] if args else kwargs["input"]
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        if weight is not self.weights[key.scope]:
            return
        macs = _macs(kind, weight, source, result) // (self.samples if varies else 1)
        self.calls[key.scope].append(Call(key, self.numbers.get(source), self.numbers.get(result), macs))


def _macs(kind: str, weight: Tensor, source: Tensor, result: Tensor) -> int:
    """Multiply-accumulates of one call: the values a layer makes (a transposed convolution: reads) times the weights
    each of them meets.
    """
    if kind == "embedding":
        return 0
    return (source if kind.startswith("conv_transpose") else result).numel() * weight[0].numel()


def run_model(model: nn.Module, batch: Batch) -> Any:
    """Call the model on a copy of a batch; a failure becomes InvalidRequest with what the batch was."""
    return _call(model, *own_inputs(*batch))


def _call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return model(*args, **kwargs)
    except QuantkitError:
        raise
    except Exception as error:  # whatever the user's code raises
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors_of((args, kwargs))) or "no tensors"
        raise InvalidRequest(
            f"The model rejected a calibration batch ({shapes}): {type(error).__name__}: {str(error).rstrip(' .')}. "
            "Pass batches exactly as the model takes them: a tensor, a tuple of arguments or a dict of keywords."
        ) from error


def _results_of(value: Any) -> list[Tensor]:
    """All tensors of what a model returned, also those in dataclasses."""
    found = []
    for leaf in tree_flatten(value)[0]:
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found += _results_of([getattr(leaf, field.name) for field in fields(leaf)])
    return found


def untraced(model: nn.Module) -> Trace:
    """What is known of a model that cannot be run: its layers, and nothing of what it computes."""
    kinds = {name: kind for name, module in model.named_modules() if (kind := layer_kind(module)) is not None}
    return Trace((), {}, {}, {}, (), kinds, {}, {}, {}, frozenset())


def trace(model: nn.Module, batch: Batch) -> Trace:
    """Run ``model`` (in eval mode) once on ``batch`` = (args, kwargs) and record what it computes."""
    recorder = _Recorder(model, max(1, batch_size(batch)))
    args, kwargs = change_inputs(model, *batch, recorder.record_input)
    recorder.varying.update(recorder.numbers.get(t) for t in tensors_of((args, kwargs)))
    with torch.no_grad(), intercept(model, recorder):
        result = _call(model, args, kwargs)
    consumers: dict[int, list[Op]] = defaultdict(list)
    for op in recorder.ops:
        for value in op.inputs:
            consumers[value].append(op)
    return Trace(
        ops=tuple(recorder.ops),
        producer=recorder.producer,
        shape=recorder.shape,
        calls={name: tuple(recorder.calls[name]) for name in recorder.kinds if name in recorder.calls},
        outputs=tuple(recorder.numbers.get(t) for t in _results_of(result)),
        kinds=recorder.kinds,
        makers={value: op for op in recorder.ops for value in op.outputs},
        consumers={value: tuple(ops) for value, ops in consumers.items()},
        stored=recorder.stored,
        varying=frozenset(recorder.varying),
    )
