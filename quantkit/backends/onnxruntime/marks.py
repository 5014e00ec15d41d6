"""The float graph of a simulated model with marks where codes go: exported once, rewritten without matching names.

A mark is an identity operation that remembers a name: ``quantkit::Site(x)`` sits where a site's tensor, or an echo of
it, is made, with that place, since a plan that leaves layers float needs fewer of them; ``quantkit::Weight(w)``
wherever a layer's weight is read. They are put in while the model runs under torch.export, by the same keys that
tracing found and simulation uses.
"""

from __future__ import annotations

import inspect
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

from quantkit.errors import InvalidRequest
from quantkit.program.inputs import Batch, batch_size, first_samples
from quantkit.program.intercept import OpKey, operation_name, tensors_of
from quantkit.program.layers import Weights
from quantkit.progress import notice
from quantkit.simulation.model import SimulatedModel, run_with

DOMAIN = "quantkit"
BATCH = "batch"
OPSET = 21
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


def _mark(kind: str, tensor: Tensor, **attributes: str) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{kind}", (tensor,), {**attributes}, dtype=tensor.dtype, shape=tensor.shape, version=1
    )


class _WeightMarks(TorchFunctionMode):
    """Marks the layers' weights wherever a torch call reads them."""

    def __init__(self, floats: Weights) -> None:
        super().__init__()
        whole = {name: w for name, w in floats.layers.items() if w.parameter is not None and w.region is None}
        self.names = {id(floats.tensor(str(w.parameter))): name for name, w in whole.items()}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operation_name(func) is not None:
            args, kwargs = tree_map(self._marked, (args, kwargs))
        return func(*args, **kwargs)

    def _marked(self, value: Any) -> Any:
        return _mark("Weight", value, name=self.names[id(value)]) if id(value) in self.names else value


class _MarkedModel(nn.Module):
    """A model as a function from its input tensors to its output tensors, with marks."""

    def __init__(self, simulated: SimulatedModel, leaves: Sequence[Any], spec: TreeSpec) -> None:
        super().__init__()
        self.model, self.floats = simulated.model, simulated.floats
        self.places = {place: site.name for site in simulated.sites for place in (site.place, *site.echoes)}
        self.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.spec = spec

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = list(self.constants)
        for position, tensor in zip(self.tensors, inputs, strict=True):
            leaves[position] = tensor
        args, kwargs = tree_unflatten(leaves, self.spec)
        with _WeightMarks(self.floats):
            return tuple(tensors_of(run_with(self.model, self._change, args, kwargs)))

    def _change(self, place: OpKey, tensor: Tensor) -> Tensor:
        if place not in self.places:
            return tensor
        return _mark("Site", tensor, name=self.places[place], place=str(place))


def mark_graph(simulated: SimulatedModel, example: Batch) -> MarkedGraph:
    """Export the float graph of ``simulated`` with a dynamic batch dimension where the model allows one.

    A model whose code only runs at the example's batch size keeps it, with a notice. Raises InvalidRequest when
    torch.export cannot follow the model at all. The graph is float32.
    """
    simulated = simulated.in_float32()
    model, size = simulated.model, batch_size(example)
    inputs = input_names(model, example)
    batched = [tensor.dim() > 0 and len(tensor) == size for tensor in tensors_of(example)]
    outputs = _output_names(model, example)
    small = _resized(example, size)
    try:
        exported = _export(simulated, small, batched)
    except _EXPORT_ERRORS as error:
        notice(
            f"the ONNX file takes batches of {size} only: the model's code fixes the size, as len(x) or a written-out "
            f"size does and x.shape[0] does not ({_summary(error)})"
        )
        batched = [False] * len(batched)
        exported = _export_at_fixed_size(simulated, example, batched)
    return MarkedGraph(exported, inputs, outputs, tuple(n for n, b in zip(inputs, batched, strict=True) if b))


def _output_names(model: nn.Module, example: Batch) -> tuple[str, ...]:
    with torch.no_grad():
        result = model(*example[0], **example[1])
    if not tensors_of(result):
        raise InvalidRequest(
            f"The model cannot be exported to ONNX: it returns {type(result).__name__}, in which no tensor is found. "
            "Let it return a tensor, a tuple or a dict."
        )
    return leaf_names(result, "output")


def _resized(example: Batch, size: int) -> Batch:
    """The example with as few samples as torch.export needs; a single sample is repeated."""
    if size >= _EXPORT_SAMPLES:
        return first_samples(example, _EXPORT_SAMPLES)

    def doubled(value: Any) -> Any:
        return torch.cat([value, value]) if isinstance(value, Tensor) and value.dim() and len(value) == size else value

    return tree_map(doubled, example)


def _export_at_fixed_size(simulated: SimulatedModel, example: Batch, batched: Sequence[bool]) -> ir.Model:
    try:
        return _export(simulated, example, batched)
    except _EXPORT_ERRORS as error:
        raise InvalidRequest(
            f"The model cannot be exported to ONNX: torch.export stopped at {_summary(error)} "
            "Its forward must not choose its operations by the values of tensors."
        ) from error


def _summary(error: Exception) -> str:
    """An exporter's error without the pages that follow its first line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _export(simulated: SimulatedModel, example: Batch, batched: Sequence[bool]) -> ir.Model:
    leaves, spec = tree_flatten(example)
    marked = _MarkedModel(simulated, leaves, spec).eval()
    tensors = tuple(tensors_of(example))
    dims = tuple({0: torch.export.Dim(BATCH)} if dynamic else {} for dynamic in batched)
    with torch.no_grad(), _quiet():
        program = torch.export.export(marked, tensors, dynamic_shapes=(dims,), strict=False)
        exported = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False)
    assert exported is not None
    return exported.model


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks on itself and on packages that are not installed out of the user's log."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def marks(graph: ir.Graph, kind: str) -> list[tuple[str, ir.Node]]:
    """(name, node) of every mark of a kind, in graph order."""
    return [(n.attributes["name"].as_string(), n) for n in graph if n.domain == DOMAIN and n.op_type == kind]
