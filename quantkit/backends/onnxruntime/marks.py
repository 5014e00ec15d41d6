"""The float graph of a simulated model with marks where codes go: exported once, rewritten without matching names.

A mark is an identity operation that remembers a name: ``quantkit::Site(x)`` sits where a site's tensor, or an echo of
it, is made, with that place, since a plan that leaves layers float needs fewer of them; ``quantkit::Weight(w)``
wherever a layer's weight is read. They are put in while the model runs under torch.export, by the same keys that
tracing found and simulation uses.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_flatten_with_path, tree_map, tree_unflatten

from quantkit.backends.onnxruntime.replayed import ReplayedModel
from quantkit.backends.onnxruntime.translated import export_advice, first_line, root_cause
from quantkit.errors import InvalidRequest
from quantkit.program.inputs import Batch, batch_size, first_samples
from quantkit.program.intercept import OpKey, operation_name, tensors_of
from quantkit.program.layers import Operands, Weights
from quantkit.program.outputs import named_tensors, results_of
from quantkit.program.program import Program
from quantkit.program.record import record
from quantkit.program.replayable import replayable
from quantkit.program.tracing import tracing
from quantkit.program.updates import plain_mode, restored
from quantkit.progress import notice
from quantkit.simulation.model import SimulatedModel, run_with

DOMAIN = "quantkit"
BATCH = "batch"
OPSET = 21
_QUIETER = {
    "torch.onnx": logging.ERROR,
    "onnxscript": logging.ERROR,
    "torch._subclasses.fake_tensor": logging.CRITICAL,
    "torch.fx.experimental.symbolic_shapes": logging.ERROR,
}
_EXPORT_SAMPLES = 2  # torch.export takes a dimension of 1 for a constant
_EXPORT_ERRORS = (RuntimeError, ValueError, TypeError, AssertionError, KeyError, IndexError, AttributeError)


@dataclass(frozen=True)
class MarkedGraph:
    """A float ONNX graph with marks, and the names of its inputs and outputs as users see them.

    ``dynamic`` are the inputs whose first dimension is the batch; empty where the model runs at one batch size only.
    """

    model: ir.Model
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: tuple[str, ...]


def leaf_names(value: Any, root: str) -> tuple[str, ...]:
    """A name for each tensor of a nested value: keys and positions joined by dots, after ``root`` if no key leads."""
    names = []
    for path, leaf in tree_flatten_with_path(value)[0]:
        if isinstance(leaf, Tensor):
            parts = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
            names.append(".".join(parts if parts and not parts[0].isdigit() else [root, *parts]))
    return tuple(names)


def input_names(model: nn.Module, batch: Batch) -> tuple[str, ...]:
    """The names of a batch's tensors: the model's own argument names."""
    args, kwargs = batch
    positional: list[str] = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional += [f"{parameter.name}.{i}" for i in range(len(args) - len(positional))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            positional.append(parameter.name)
    return leaf_names(dict(zip(positional, args, strict=False)) | kwargs, "input")


def output_names(result: Any, inputs: Sequence[str]) -> tuple[str, ...]:
    """A name for each tensor that a model returned, as ``leaf_names`` gives them; other ones, with a notice, where
    inputs or outputs before have them.
    """
    taken, found = set(inputs), []
    for key, _ in named_tensors(result):
        plain = key.replace("[", ".").replace("]", "")
        plain = f"output.{plain}" if plain[:1].isdigit() else plain
        tried = itertools.chain([plain, f"{plain}.output"], (f"{plain}.output.{i}" for i in itertools.count(1)))
        found.append(next(name for name in tried if name not in taken))
        taken.add(found[-1])
        if found[-1] != plain:
            notice(f"output {plain!r} has the name of another tensor of the model: it is {found[-1]!r} in the file")
    return tuple(found)


def _mark(kind: str, tensor: Tensor, **attributes: str) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{kind}", (tensor,), {**attributes}, dtype=tensor.dtype, shape=tensor.shape, version=1
    )


class _Marks:
    """Marks the tensors of sites, and the parameters that hold layers' weights."""

    def __init__(self, simulated: SimulatedModel) -> None:
        self.places = {place: site.name for site in simulated.sites for place in (site.place, *site.echoes)}
        self.parameters = parameter_marks(simulated)
        self.floats, self.quantized = simulated.floats, list(simulated.weights)
        self.keys: list[OpKey] = []  # of the calls of the last run: the exporter puts a module's own attributes back

    def change(self, place: OpKey, tensor: Tensor) -> Tensor:
        if place not in self.places:
            return tensor
        return _mark("Site", tensor, name=self.places[place], place=str(place))

    def parameter(self, name: str, tensor: Tensor) -> Tensor:
        return _mark("Weight", tensor, name=self.parameters[name]) if name in self.parameters else tensor

    def weight(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter by its name, or by a layer's the weight that is computed."""
        if name in self.floats.layers and self.floats.layers[name].parameter is None:
            return _mark("Weight", tensor, name=name)
        return self.parameter(name, tensor)

    def operands(self) -> Operands:
        """What calls read instead of weights that the model computes."""
        found: Operands = {}
        for name in self.quantized:
            for key, (position, operand) in self.floats.operands([name]).items():
                found[key] = position, _mark("Weight", operand, name=name)
        return found


def parameter_marks(simulated: SimulatedModel) -> dict[str, str]:
    """Parameter -> the name of its mark: the layer that reads the whole of it as it is, or itself where layers read
    parts of it or turn it.
    """
    found: dict[str, str] = {}
    for name, weight in simulated.floats.layers.items():
        if weight.parameter is not None:
            plain = weight.region is None and weight.order is None
            found[weight.parameter] = name if plain else weight.parameter
    return found


class _WeightMarks(TorchFunctionMode):
    """Marks parameters wherever a torch call reads them."""

    def __init__(self, floats: Weights, marks: _Marks) -> None:
        super().__init__()
        self.marks = marks
        self.names = {id(floats.tensor(name)): name for name in marks.parameters}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operation_name(func) is not None:
            args, kwargs = tree_map(self._marked, (args, kwargs))
        return func(*args, **kwargs)

    def _marked(self, value: Any) -> Any:
        return self.marks.parameter(self.names[id(value)], value) if id(value) in self.names else value


class _MarkedModel(nn.Module):
    """A model as a function from its input tensors to its output tensors, with marks."""

    def __init__(self, simulated: SimulatedModel, leaves: Sequence[Any], spec: TreeSpec) -> None:
        super().__init__()
        self.model, self.marks = simulated.model, _Marks(simulated)
        self.floats = simulated.floats
        self.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.spec = spec

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = list(self.constants)
        for position, tensor in zip(self.tensors, inputs, strict=True):
            leaves[position] = tensor
        args, kwargs = tree_unflatten(leaves, self.spec)
        self.marks.keys.clear()
        with _WeightMarks(self.floats, self.marks):  # built here: the exporter puts tensors of its own in their places
            result = run_with(
                self.model, self.marks.change, args, kwargs,
                before=lambda key, *_: self.marks.keys.append(key), operands=self.marks.operands(),
            )  # fmt: skip
        return tuple(tensor for _, tensor in named_tensors(result))


def mark_graph(simulated: SimulatedModel, example: Batch) -> MarkedGraph:
    """Export the float graph of ``simulated`` with a dynamic batch dimension where the model allows one.

    A model whose code takes another path while it is exported, or fixes its batch size, is exported by its program
    where that stands for it. One that runs at the example's batch size only keeps that, with a notice. Raises
    InvalidRequest when torch.export cannot follow the model at all. The graph is float32.
    """
    simulated = simulated.in_float32()
    if simulated.updated:
        notice(
            f"the model's forward updates {', '.join(simulated.updated)}: the file holds the values that the "
            "quantized model has now, and every run of it starts from them"
        )
    model, size = simulated.model, batch_size(example)
    inputs = input_names(model, example)
    batched = [tensor.dim() > 0 and len(tensor) == size for tensor in tensors_of(example)]
    outputs, keys = _outputs_and_calls(simulated, example, inputs)
    small = _resized(example, size)
    try:
        exported = _export(simulated, small, batched, keys)
    except _EXPORT_ERRORS as error:
        notice(
            f"the ONNX file takes batches of {size} only: the model's code fixes the size, as a written-out size does "
            f"and x.shape[0] does not ({first_line(error)})"
        )
        batched = [False] * len(batched)
        exported = _export_at_fixed_size(simulated, example, batched, keys)
    return MarkedGraph(exported, inputs, outputs, tuple(n for n, b in zip(inputs, batched, strict=True) if b))


def _outputs_and_calls(
    simulated: SimulatedModel, example: Batch, inputs: Sequence[str]
) -> tuple[tuple[str, ...], list[OpKey]]:
    """The names of the outputs beside those of the inputs, and the keys of the calls of a run that is not being
    exported.
    """
    keys: list[OpKey] = []
    with plain_mode(simulated.model), restored(simulated.model, simulated.updated):
        result = run_with(simulated.model, lambda _, tensor: tensor, *example, before=lambda key, *_: keys.append(key))
    if not results_of(result):
        raise InvalidRequest(
            f"The model cannot be exported to ONNX: it returns {type(result).__name__}, in which no tensor is found. "
            "Let it return a tensor, a tuple or a dict."
        )
    return output_names(result, inputs), keys


def _resized(example: Batch, size: int) -> Batch:
    """The example with as few samples as torch.export needs; a single sample is repeated."""
    if size >= _EXPORT_SAMPLES:
        return first_samples(example, _EXPORT_SAMPLES)

    def doubled(value: Any) -> Any:
        return torch.cat([value, value]) if isinstance(value, Tensor) and value.dim() and len(value) == size else value

    return tree_map(doubled, example)


def _export_at_fixed_size(
    simulated: SimulatedModel, example: Batch, batched: Sequence[bool], keys: Sequence[OpKey]
) -> ir.Model:
    try:
        return _export(simulated, example, batched, keys)
    except _EXPORT_ERRORS as error:
        raise InvalidRequest(
            f"The model cannot be exported to ONNX. {export_advice(error)} "
            f"(torch.export: {first_line(root_cause(error))})"
        ) from error


def _export(simulated: SimulatedModel, example: Batch, batched: Sequence[bool], keys: Sequence[OpKey]) -> ir.Model:
    leaves, spec = tree_flatten(example)
    marked = _MarkedModel(simulated, leaves, spec).eval()
    try:
        exported = _exported(marked, example, batched)
        if marked.marks.keys == list(keys):
            return exported
    except _EXPORT_ERRORS:
        if (program := _program_of(simulated, example)) is None:
            raise
    else:
        program = _program_of(simulated, example)
    if program is None:
        raise RuntimeError("the model's code takes another path while it is exported")
    marks = _Marks(simulated)
    return _exported(ReplayedModel(simulated, program, marks.change, marks.weight).eval(), example, batched)


def _exported(marked: nn.Module, example: Batch, batched: Sequence[bool]) -> ir.Model:
    tensors = tuple(tensors_of(example))
    dims = tuple({0: torch.export.Dim(BATCH)} if dynamic else {} for dynamic in batched)
    with tracing(), plain_mode(marked), restored(marked), _quiet():
        program = torch.export.export(marked, tensors, dynamic_shapes=(dims,), strict=False)
        exported = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False)
    assert exported is not None
    return exported.model


def _program_of(simulated: SimulatedModel, example: Batch) -> Program | None:
    """The program that stands for a model; None where none does, as where values of inputs decide what is called."""
    program = record(simulated.model, example)
    return None if program.decides_by_values else replayable(program, simulated.model, example, ())


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks on itself and on packages that are not installed out of the user's log, and what it
    logs of a failure that is raised too.
    """
    loggers = {logging.getLogger(name): level for name, level in _QUIETER.items()}
    levels = {logger: logger.level for logger in loggers}
    for logger, level in loggers.items():
        logger.setLevel(level)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def marks(graph: ir.Graph, kind: str) -> list[tuple[str, ir.Node]]:
    """(name, node) of every mark of a kind, in graph order."""
    return [(n.attributes["name"].as_string(), n) for n in graph if n.domain == DOMAIN and n.op_type == kind]
