"""What a model computes, found by running it once: operations in order, the tensors between them, the layers.

Tensors are numbered, not named: two uses of one tensor share a number, an in-place operation makes a new one, and a
call that returns its argument unchanged (eval-mode dropout, ``contiguous``) keeps it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from quantkit.errors import InvalidRequest
from quantkit.graph.intercept import OpKey, change_inputs, intercept, map_tensors, tensors_of
from quantkit.graph.layers import layer_kind, weight_of


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

    ``producer`` maps a value to the place that made it, model inputs included; parameters have none. ``makers`` and
    ``consumers`` give the operation that made a value and those that read it (once per use). ``shape`` keeps the batch
    dimension. ``kinds`` names every layer, called or not.
    """

    ops: tuple[Op, ...]
    producer: dict[int, OpKey]
    shape: dict[int, tuple[int, ...]]
    calls: dict[str, tuple[Call, ...]]
    outputs: tuple[int, ...]
    kinds: dict[str, str]
    makers: dict[int, Op]
    consumers: dict[int, tuple[Op, ...]]


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


class _Recorder:
    """Collects operations while the model runs."""

    def __init__(self, model: nn.Module) -> None:
        self.numbers = _Numbers()
        self.ops: list[Op] = []
        self.producer: dict[int, OpKey] = {}
        self.shape: dict[int, tuple[int, ...]] = {}
        self.calls: dict[str, list[Call]] = defaultdict(list)
        self.layers = {name: m for name, m in model.named_modules() if layer_kind(m) is not None}

    def made(self, key: OpKey, tensor: Tensor, number: int) -> None:
        self.producer[number] = key
        self.shape[number] = tuple(tensor.shape)

    def record_input(self, key: OpKey, tensor: Tensor) -> Tensor:
        own = tensor.clone()  # a model that works in place must not change the caller's data
        self.made(key, own, self.numbers.get(own))
        return own

    def __call__(self, key: OpKey, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        read = tensors_of((args, kwargs))
        inputs = tuple(self.numbers.get(t) for t in read)
        versions = [t._version for t in read]
        result = func(*args, **kwargs)
        changed = {id(t) for t, version in zip(read, versions, strict=True) if t._version != version}
        outputs: list[int] = []

        def number(place: OpKey, tensor: Tensor) -> Tensor:
            known = any(tensor is t for t in read)
            if known and id(tensor) not in changed:
                return tensor  # the call returned its argument: the same value goes on
            value = self.numbers.new(tensor)
            self.made(place, tensor, value)
            outputs.append(value)
            return tensor

        map_tensors(result, key, number)
        if outputs:
            plain = tuple(a for a in (*args, *kwargs.values()) if not isinstance(a, Tensor))
            self.ops.append(Op(key, inputs, tuple(outputs), plain))
            self.record_layer(key, args, kwargs, inputs, outputs[0], result)
        return result

    def record_layer(self, key: OpKey, args: Any, kwargs: Any, inputs: Any, output: int, result: Any) -> None:
        layer = self.layers.get(key.scope)
        if layer is None or not any(t is layer.weight for t in tensors_of((args, kwargs))):
            return
        made = result.numel() // max(1, result.shape[0])
        macs = 0 if isinstance(layer, nn.Embedding) else made * weight_of(layer, "")[0].numel()
        self.calls[key.scope].append(Call(key, inputs[0], output, macs))


def run_model(model: nn.Module, batch: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    """Call the model on a batch; a failure becomes InvalidRequest with what the batch was."""
    args, kwargs = batch
    try:
        return model(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors_of(batch)) or "no tensors"
        raise InvalidRequest(
            f"The model rejected a calibration batch ({shapes}): {type(error).__name__}: {error} "
            "Pass batches exactly as the model takes them: a tensor, a tuple of arguments or a dict of keywords."
        ) from error


def trace(model: nn.Module, batch: tuple[tuple[Any, ...], dict[str, Any]]) -> Trace:
    """Run ``model`` (in eval mode) once on ``batch`` = (args, kwargs) and record what it computes."""
    recorder = _Recorder(model)
    args, kwargs = change_inputs(*batch, recorder.record_input)
    with torch.no_grad(), intercept(model, recorder):
        result = run_model(model, (args, kwargs))
    consumers: dict[int, list[Op]] = defaultdict(list)
    for op in recorder.ops:
        for value in op.inputs:
            consumers[value].append(op)
    return Trace(
        ops=tuple(recorder.ops),
        producer=recorder.producer,
        shape=recorder.shape,
        calls={name: tuple(recorder.calls[name]) for name in recorder.layers if name in recorder.calls},
        outputs=tuple(recorder.numbers.get(t) for t in tensors_of(result)),
        kinds={name: str(layer_kind(layer)) for name, layer in recorder.layers.items()},
        makers={value: op for op in recorder.ops for value in op.outputs},
        consumers={value: tuple(ops) for value, ops in consumers.items()},
    )
