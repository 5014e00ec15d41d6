"""Recording a model: one run on a batch, every torch call written down."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from quantkit.errors import InvalidRequest, QuantkitError
from quantkit.program.arguments import SizeRef, frozen, leaves_of
from quantkit.program.halves import VIEWS, may_write
from quantkit.program.inputs import Batch, batch_size
from quantkit.program.intercept import OpKey, change_inputs, computing, device_of, intercept, own_inputs, tensors_of
from quantkit.program.layers import LayerCall, LayerWeight, module_layers
from quantkit.program.outputs import main_output, named_tensors
from quantkit.program.products import Owners, operations_per_sample, products_of
from quantkit.program.program import Program, Step
from quantkit.program.sizes import Computed, Extent, following
from quantkit.program.updates import named_state, plain_mode, restored

# Calls that carry values out of torch, where they may decide anything.
_READ_OUT = frozenset(
    "item tolist numpy array bool int float complex index contains equal allclose is_nonzero".split()
)


class _Numbers:
    """Numbers for tensors by identity, held weakly, so that a recording keeps no activation alive."""

    def __init__(self) -> None:
        self.of_tensor: Any = WeakTensorKeyDictionary()
        self.next = 0

    def new(self, tensor: Tensor) -> int:
        self.of_tensor[tensor] = self.next
        self.next += 1
        return self.next - 1

    def overwritten(self, tensor: Tensor) -> list[tuple[int, int]]:
        """(old, new) numbers of all tensors in the memory of one that was written to."""
        same = [other for other in list(self.of_tensor) if _memory(other) == _memory(tensor)]
        return [(self.of_tensor[other], self.new(other)) for other in same]


def _product(*sizes: int) -> int:
    return math.prod(sizes)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)


def _state(tensor: Tensor) -> Any:
    """What changes when a tensor is written to: its version, or its values where inference mode counts none."""
    return tensor.clone() if tensor.is_inference() else tensor._version


def _written(tensor: Tensor, state: Any) -> bool:
    return not torch.equal(tensor, state) if isinstance(state, Tensor) else tensor._version != state


@dataclass(frozen=True)
class _Call:
    """A call as it is being recorded: the numbers it reads, and what its result depends on."""

    key: OpKey
    args: Any
    kwargs: Any
    inputs: tuple[int, ...]
    varies: bool
    sources: frozenset[str]
    sized: bool

    @property
    def constant(self) -> bool:
        return not (self.varies or self.sources or self.sized)


class Recorder:
    """Collects steps while a model runs on ``samples`` samples."""

    def __init__(self, model: nn.Module, samples: int) -> None:
        self.samples = samples
        self.numbers = _Numbers()
        self.owners, self.modules = Owners(model), module_layers(model)
        self.steps: list[Step] = []
        self.producer: dict[int, OpKey] = {}
        self.shape: dict[int, tuple[int, ...]] = {}
        self.dtypes: dict[int, torch.dtype] = {}
        self.floating: set[int] = set()
        self.varying: set[int] = set()
        self.sized: set[int] = set()
        self.constants: dict[int, Tensor] = {}
        self.sources: dict[int, frozenset[str]] = {}  # of what depends on parameters: their names
        self.calls: dict[str, list[LayerCall]] = defaultdict(list)
        self.weights: dict[str, LayerWeight] = {}
        self.of_parameters: list[tuple[str, LayerWeight, LayerCall]] = []  # calls that read what parameters alone make
        self.stored: dict[str, int] = {}
        for name, tensor in named_state(model).items():
            known = self.numbers.of_tensor.get(tensor)
            self.stored[name] = self._number_new(tensor) if known is None else known
            self.sources.setdefault(self.stored[name], frozenset([name]))

    def _number_new(self, tensor: Tensor) -> int:
        number = self.numbers.new(tensor)
        self._describe(tensor, number)
        return number

    def _describe(self, tensor: Tensor, number: int) -> None:
        self.shape[number] = tuple(tensor.shape)
        if tensor.is_floating_point():
            self.floating.add(number)

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor; one that no call made and the model does not store is a constant of the code."""
        number = self.numbers.of_tensor.get(tensor)
        if number is None:
            number = self._number_new(tensor)
            self.constants[number] = tensor
        return int(number)

    def record_input(self, key: OpKey, tensor: Tensor) -> Tensor:
        self.producer[self.number_of_input(tensor)] = key
        return tensor

    def number_of_input(self, tensor: Tensor) -> int:
        number = self.numbers.of_tensor.get(tensor)
        number = self._number_new(tensor) if number is None else number
        self.varying.add(number)
        self.dtypes[number] = tensor.dtype
        return int(number)

    def read_shape(self, tensor: Tensor, result: Any, *axis: Any, **named: Any) -> Any:
        """What a model gets for the shape or a size of a tensor: numbers that remember it, where it may change."""
        number = self.numbers.of_tensor.get(tensor)
        if number is None or not (number in self.varying or number in self.sized):
            return result
        if isinstance(result, torch.Size):
            sizes: list[Any] = [following(size, Extent(number, i), self) for i, size in enumerate(result)]
            return torch.Size(sizes)
        if not axis and not named:  # the number of elements
            return following(result, Computed(_product, tuple(Extent(number, i) for i in range(tensor.dim()))), self)
        asked = axis[0] if axis else named["dim"]
        return following(result, Extent(number, int(asked) % tensor.dim()), self)

    def __call__(self, key: OpKey, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        read = [leaf for leaf in leaves_of((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(torch.is_autocast_enabled(kind) for kind in {x.device.type for x in read}):
            raise InvalidRequest(
                f"The model's own forward turns autocast on: {key} runs under it, in types that codes and a file do "
                "not have. Take torch.autocast out of the forward, or give it enabled=False; around calls of the "
                "model it may stay."
            )
        call = self._call(key, args, kwargs, read)
        states = [_state(t) for t in read]
        if not call.constant and may_write(func, kwargs):
            self._keep_as_it_is(read)
        result = func(*args, **kwargs)

        written = [t for t, state in zip(read, states, strict=True) if _written(t, state)]
        rewrites = [pair for tensor in written for pair in self.numbers.overwritten(tensor)]
        for old, new in rewrites:
            self.shape[new] = self.shape[old]
            self.floating |= {new} if old in self.floating else set()
            self._depends(new, call, old)
        # a call may return its argument: the same value
        same = {id(t) for t in read} - {id(t) for t in written}
        makes, outputs = self._made(call, tensors_of(result), same)
        if makes or written or (key.op in _READ_OUT and not isinstance(result, Tensor)):
            step = Step(key, func, call.args, call.kwargs, call.inputs, makes, outputs, tuple(rewrites), call.constant)
            self.steps.append(step)
        self.owners.follow(key.op, args, result)
        if outputs:
            self._record_layers(call, args, kwargs, result)
        return result

    def _call(self, key: OpKey, args: Any, kwargs: Any, read: list[Tensor]) -> _Call:
        own_args, own_kwargs = frozen(args, self.number, self), frozen(kwargs, self.number, self)
        inputs = tuple(self.number(t) for t in read)
        follows = any(isinstance(leaf, SizeRef) for leaf in leaves_of((own_args, own_kwargs)))
        return _Call(
            key,
            own_args,
            own_kwargs,
            inputs,
            not self.varying.isdisjoint(inputs),
            frozenset().union(*(self.sources.get(n, frozenset()) for n in inputs)),
            follows or not self.sized.isdisjoint(inputs),
        )

    def _keep_as_it_is(self, read: list[Tensor]) -> None:
        """Hold constants as they are before a call that may write to them."""
        for tensor in read:
            if (number := self.numbers.of_tensor[tensor]) in self.constants:
                self.constants[number] = tensor.clone()

    def _depends(self, number: int, call: _Call, before: int | None = None) -> None:
        """Note what a value depends on: what the call that made it reads, and where it was overwritten what it was."""
        if call.varies or before in self.varying:
            self.varying.add(number)
        if call.sized or before in self.sized:
            self.sized.add(number)
        if sources := call.sources | (self.sources.get(before, frozenset()) if before is not None else frozenset()):
            self.sources[number] = sources

    def _made(self, call: _Call, tensors: list[Tensor], same: set[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The numbers of all tensors of a result, and of the floating-point ones that are new; none where all of it
        was read.
        """
        makes, outputs = [], []
        for position, tensor in enumerate(tensors):
            if id(tensor) in same:
                makes.append(self.numbers.of_tensor[tensor])
                continue
            number = self._number_new(tensor)
            makes.append(number)
            self._depends(number, call)
            if call.constant:
                self.constants[number] = tensor
            if tensor.is_floating_point():
                self.producer[number] = replace(call.key, output=position)
                outputs.append(number)
        return (tuple(makes), tuple(outputs)) if any(id(t) not in same for t in tensors) else ((), ())

    def _record_layers(self, call: _Call, args: Any, kwargs: Any, result: Any) -> None:
        def fixed(tensor: Tensor) -> bool:
            return tensor in self.owners.picked or (
                (number := self.number(tensor)) not in self.varying and bool(self.sources.get(number))
            )

        for product in products_of(call.key.op, args, kwargs, fixed):
            source = None if product.source is None else self.number(product.source)
            of_parameters = source in self.sources or product.kind == "matmul"
            computing = not call.varies and source in self.floating and of_parameters
            number = self.number(product.weight)
            found = self.owners.layer(product, call.key, self.sources[number])
            if found is None or source is None:
                continue
            name, weight = found
            if weight.parameter is None and number in self.sized:
                continue  # a weight for one size of the inputs, as a query repeated for every sample, is none
            made = tensors_of(result)[0]
            macs = operations_per_sample(product, made, self.samples if call.varies else 1)
            of_layer = LayerCall(call.key, source, self.number(made), macs, call.inputs.index(source))
            if computing:
                if weight.parameter is not None:
                    self.of_parameters.append((name, weight, of_layer))
                continue
            known = self.weights.setdefault(name, weight)
            if weight.parameter is None:
                at = (*known.at, (call.key, call.inputs.index(number)))
                self.weights[name] = replace(known, numbers=(*known.numbers, number), at=at)
            self.calls[name].append(of_layer)

    def layers(self) -> dict[str, LayerWeight]:
        """The layers that were called. Of what reads parameters alone, all but the makers of other layers' weights."""
        held = {name for weight in self.weights.values() for name in (weight.parameter, *weight.sources)}
        for name, weight, call in self.of_parameters:
            if weight.parameter not in held:
                self.weights.setdefault(name, weight)
                self.calls[name].append(call)
        known = {*self.producer, *self.stored.values()} - self.varying  # what no call made may depend on anything
        constant = {name for name, calls in self.calls.items() if known.issuperset(call.input for call in calls)}
        return {name: replace(w, reads_constant=name in constant) for name, w in self.weights.items()}


def run_model(model: nn.Module, batch: Batch, updated: Collection[str] | None = None) -> Any:
    """Call the model on a copy of a batch, without gradients; a failure becomes InvalidRequest with what the batch
    was. Of what its forward updates, what is named comes out as it was: default all.
    """
    with plain_mode(model), restored(model, updated), computing(model):
        return _called(model, *own_inputs(*batch, device_of(model)))


def _called(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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


def unrecorded(model: nn.Module) -> Program:
    """What is known of a model that cannot be run: its layers, and nothing of what it computes."""
    weights = module_layers(model)
    kinds = {name: weight.kind for name, weight in weights.items()}
    nothing: frozenset[int] = frozenset()
    return Program(1, (), (), (), (), {}, {}, {}, kinds, weights, {}, {}, nothing, nothing)


def record(model: nn.Module, batch: Batch) -> Program:
    """Run ``model`` (in eval mode) once on ``batch`` = (args, kwargs) and record what it computes."""
    with plain_mode(model), restored(model) as updated:
        recorder = Recorder(model, max(1, batch_size(batch)))
        args, kwargs = change_inputs(model, *batch, recorder.record_input)
        inputs = [recorder.number_of_input(tensor) for tensor in tensors_of((args, kwargs))]
        with intercept(model, recorder, recorder.read_shape):
            result = _called(model, args, kwargs)
        named = dict(named_tensors(result))
        outputs = {name: recorder.number(tensor) for name, tensor in named.items()}
        floating = any(tensor.is_floating_point() for tensor in named.values())
        output = recorder.number(main_output(result)) if floating else -1
    return replace(_program(recorder, inputs, outputs, updated), output=output)


def _program(recorder: Recorder, inputs: list[int], outputs: dict[str, int], updated: list[str]) -> Program:
    steps = _with_written_made_anew(recorder)
    needed = {n for step in steps if not step.constant for n in step.inputs} | set(outputs.values())
    weights = recorder.layers()
    held = {recorder.stored[name] for w in weights.values() for name in ([w.parameter] if w.parameter else w.sources)}
    never_called = {name: w for name, w in recorder.modules.items() if recorder.stored[str(w.parameter)] not in held}
    weights |= {name: w for name, w in never_called.items() if name not in weights}
    return Program(
        size=recorder.samples,
        steps=steps,
        inputs=tuple(inputs),
        dtypes=tuple(recorder.dtypes[number] for number in inputs),
        outputs=tuple(outputs.values()),
        output_names=tuple(outputs),
        producer=recorder.producer,
        shape=recorder.shape,
        calls={name: tuple(calls) for name, calls in recorder.calls.items()},
        kinds={name: weight.kind for name, weight in weights.items()},
        weights=weights,
        stored=recorder.stored,
        constants={n: t for n, t in recorder.constants.items() if n in needed},
        varying=frozenset(recorder.varying),
        floating=frozenset(recorder.floating),
        updated=tuple(updated),
    )


def _with_written_made_anew(recorder: Recorder) -> tuple[Step, ...]:
    """The steps, with those repeated in every replay that make constants which others write to."""
    steps = list(recorder.steps)
    written = {old for step in steps if not step.constant for old, _ in step.rewrites}
    for i, step in reversed(list(enumerate(steps))):
        made = {*step.makes, *(new for _, new in step.rewrites)}
        if step.constant and made & written:
            steps[i] = replace(step, constant=False)
            written |= {old for old, _ in step.rewrites} | ({*step.inputs} if step.key.op in VIEWS else set())
            for number in made:
                recorder.constants.pop(number, None)
    return tuple(steps)
