"""The float graph of a simulated model with marks where codes go: exported once, rewritten without matching names.

A mark is an identity operation that remembers a name: ``quantkit::Site(x)`` sits where a site's tensor, or an echo of
it, is made, with that place, since a plan that leaves layers float needs fewer of them; ``quantkit::Weight(w)``
wherever a layer's weight is read. They are put in while the model runs under torch.export, by the same keys that
tracing found and simulation uses.
"""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field, replace
from io import StringIO
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from quantkit.backends.onnxruntime.adaptive_pools import AdaptivePools
from quantkit.backends.onnxruntime.conditions import SizeTrace
from quantkit.backends.onnxruntime.dynamic import Asked, DynamicSizes, TakenSizes, names_of
from quantkit.backends.onnxruntime.near_neutral import optimized
from quantkit.backends.onnxruntime.other_sizes import OtherSizes, refused_name
from quantkit.backends.onnxruntime.recurrences import Recurrences
from quantkit.backends.onnxruntime.replayed import ReplayedModel, with_inputs_as_given
from quantkit.backends.onnxruntime.tracing_sizes import Route, TracedSizes, trace_sizes
from quantkit.backends.onnxruntime.translated import not_exported, require_forms
from quantkit.errors import InvalidRequest
from quantkit.program.input_shapes import Place
from quantkit.program.inputs import Batch
from quantkit.program.intercept import CALL_ERRORS, OpKey, operation_name, tensors_of
from quantkit.program.layers import Operands, Weights
from quantkit.program.outputs import named_tensors, results_of
from quantkit.program.program import Program
from quantkit.program.record import record
from quantkit.program.replayable import replayable
from quantkit.program.tracing import tracing
from quantkit.program.updates import plain_mode, restored
from quantkit.progress import log, notice
from quantkit.simulation.model import SimulatedModel, run_with

DOMAIN = "quantkit"
OPSET = 21
Call = tuple[OpKey, bool]  # its key, and whether it reads floating-point tensors
_QUIETER = {
    "torch.onnx": logging.ERROR,
    "onnxscript": logging.ERROR,
    "onnx_ir": logging.ERROR,
    "torch._subclasses.fake_tensor": logging.CRITICAL,
    "torch.fx.experimental.symbolic_shapes": logging.ERROR,
}


@dataclass(frozen=True)
class MarkedGraph:
    """A float ONNX graph with marks, and the names of its inputs and outputs as users see them.

    ``taken`` says which sizes the graph takes, ``batched`` the inputs whose first dimension is any number of samples,
    ``others`` are batches that differ from the example in every other size that varies.
    """

    model: ir.Model
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    taken: TakenSizes
    batched: tuple[str, ...]
    others: tuple[Batch, ...] = ()


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
    """Marks the tensors of sites, and the parameters that hold layers' weights. ``known_as``: the keys of calls that
    have another while the model is exported, by that.
    """

    def __init__(self, simulated: SimulatedModel, known_as: Mapping[OpKey, OpKey] | None = None) -> None:
        self.known_as = known_as or {}
        self.places = {place: site.name for site in simulated.sites for place in (*site.places, *site.echoes)}
        self.parameters = parameter_marks(simulated)
        self.floats, self.quantized = simulated.floats, list(simulated.weights)
        self.calls: list[Call] = []  # of the last run: the exporter puts a module's own attributes back
        self.trace = SizeTrace()

    def change(self, place: OpKey, tensor: Tensor) -> Tensor:
        self.trace.called(place)
        if self.known_as:
            place = replace(self.known_as.get(replace(place, output=0), place), output=place.output)
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

    def relevant(self, calls: Sequence[Call]) -> list[OpKey]:
        """Of the keys of calls those that say where sites, and weights that are computed, are: not of what is computed
        of sizes and positions.
        """
        places = {*self.places, *self.floats.operands(self.quantized)}
        kinds = {(place.scope, place.op) for place in places}
        return [key for key, of_floats in calls if of_floats and (key.scope, key.op) in kinds]

    def operands(self) -> Operands:
        """What calls read instead of weights that the model computes."""
        found: Operands = {}
        traced = {known: key for key, known in self.known_as.items()}
        for name in self.quantized:
            for key, (position, operand) in self.floats.operands([name]).items():
                found[traced.get(key, key)] = position, _mark("Weight", operand, name=name)
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

    def __init__(
        self, simulated: SimulatedModel, leaves: Sequence[Any], spec: TreeSpec, known_as: Mapping[OpKey, OpKey]
    ) -> None:
        super().__init__()
        self.model, self.marks = simulated.model, _Marks(simulated, known_as)
        self.floats = simulated.floats
        self.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.spec = spec

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = list(self.constants)
        for position, tensor in zip(self.tensors, inputs, strict=True):
            leaves[position] = tensor
        args, kwargs = tree_unflatten(leaves, self.spec)
        self.marks.calls.clear()
        self.marks.trace.enter(inputs)
        with _WeightMarks(self.floats, self.marks):  # built here: the exporter puts tensors of its own in their places
            result = run_with(
                self.model, self.marks.change, args, kwargs,
                before=_noting(self.marks.calls), operands=self.marks.operands(),
            )  # fmt: skip
        return tuple(tensor for _, tensor in named_tensors(result))


def mark_graph(simulated: SimulatedModel, example: Batch, sizes: DynamicSizes | None = None) -> MarkedGraph:
    """Export the float graph of ``simulated``; the number of samples varies where the model allows it, and so do the
    ``sizes`` that are asked for.

    A model whose code takes another path while it is exported, or fixes sizes, is exported by its program where that
    stands for it. Each size that the model's code fixes keeps the example's, with a notice. Raises InvalidRequest when
    it is one that the user names, and when torch.export cannot follow the model at all. The graph is float32.
    """
    require_forms(simulated.model)
    simulated = simulated.in_float32()
    if simulated.updated:
        notice(
            f"the model's forward updates {', '.join(simulated.updated)}: the file holds the values that the "
            "quantized model has now, and every run of it starts from them"
        )
    asked = Asked.of(simulated.model, example, sizes or DynamicSizes())
    others = OtherSizes.of(simulated, asked)
    outputs, calls = _outputs_and_calls(simulated, example, tuple(asked.shapes))
    exports = _Exports(others, calls)
    traced = trace_sizes(others, exports.routes, exports.converted)
    names = names_of(asked, traced.sizes.sizes)
    _tell(asked, traced, names)
    taken = replace(traced.sizes, names=names)
    batched = tuple(name for name in asked.shapes if (name, 0) in asked.batch & taken.dynamic)
    return MarkedGraph(traced.graph, tuple(asked.shapes), outputs, taken, batched, tuple(traced.others))


def _tell(asked: Asked, traced: TracedSizes, names: Mapping[Place, str]) -> None:
    """Notices on what the model's code fixes and needs; raises InvalidRequest where the user wants it otherwise."""
    for place, reason in traced.fixed.items():
        if place in asked.named:
            raise InvalidRequest(refused_name(asked, place, asked.named[place], reason))
    told = set[str]()
    for (name, axis), reason in traced.fixed.items():
        size = asked.size((name, axis))
        what = f"batches of {size}" if (name, axis) in asked.batch else f"{size} along axis {axis} of {name!r}"
        if what not in told:
            told.add(what)
            notice(
                f"the ONNX file takes {what} only: the model's code fixes the size, as a written-out size, an if on "
                f"it or a loop over it does and x.shape[{axis}] does not, or ONNX has one of its calls at "
                f"written-out sizes only ({reason})"
            )
    if conditions := replace(traced.sizes, names=names).texts():
        notice(f"the ONNX file takes sizes with {' and '.join(conditions)}: it does not stand for the model at others")


def _outputs_and_calls(
    simulated: SimulatedModel, example: Batch, inputs: Sequence[str]
) -> tuple[tuple[str, ...], list[Call]]:
    """The names of the outputs beside those of the inputs, and the calls of a run that is not being exported."""
    calls: list[Call] = []
    with plain_mode(simulated.model), restored(simulated.model, simulated.updated):
        result = run_with(simulated.model, lambda _, tensor: tensor, *example, before=_noting(calls))
    if not results_of(result):
        raise InvalidRequest(
            f"The model cannot be exported to ONNX: it returns {type(result).__name__}, in which no tensor is found. "
            "Let it return a tensor, a tuple or a dict."
        )
    return output_names(result, inputs), calls


def _noting(calls: list[Call]) -> Callable[[OpKey, Any, Any], None]:
    """Notes calls as they come, to be given as ``before``."""

    def note(key: OpKey, args: Any, kwargs: Any) -> None:
        calls.append((key, any(tensor.is_floating_point() for tensor in tensors_of((args, kwargs)))))

    return note


@dataclass
class _Exports:
    """The ways to export a model with some sizes varying; ``followed`` are the exports by the model's own code."""

    others: OtherSizes
    calls: Sequence[Call]
    followed: dict[frozenset[Place], tuple[torch.export.ExportedProgram, _Marks]] = field(default_factory=dict)

    @property
    def routes(self) -> tuple[Route, ...]:
        return self.own, self.replayed, self.own_elsewhere

    def own(self, places: frozenset[Place]) -> tuple[torch.export.ExportedProgram, SizeTrace]:
        """By the model's own code."""
        program, marks = self._follow(places)
        if marks.calls != list(self.calls):
            raise RuntimeError("the model's code takes another path while it is exported")
        return program, marks.trace

    def own_elsewhere(self, places: frozenset[Place]) -> tuple[torch.export.ExportedProgram, SizeTrace]:
        """By the model's own code where that takes another path only while nothing is quantized: in transformers, a
        mask that would be left out where it masks nothing.
        """
        program, marks = self._follow(places)
        if marks.calls == list(self.calls):
            raise RuntimeError("the model's code takes no other path while it is exported")
        traced, known = marks.relevant(marks.calls), marks.relevant(self.calls)
        if [(key.scope, key.op) for key in traced] != [(key.scope, key.op) for key in known]:
            raise RuntimeError("the model's code takes another path between its layers while it is exported")
        if traced != known:  # more or fewer calls before them, as of what is computed of positions
            program, marks = self._marked(places, dict(zip(traced, known, strict=True)))
        return program, marks.trace

    def _follow(self, places: frozenset[Place]) -> tuple[torch.export.ExportedProgram, _Marks]:
        if places not in self.followed:
            self.followed[places] = self._marked(places, {})
        return self.followed[places]

    def _marked(
        self, places: frozenset[Place], known_as: Mapping[OpKey, OpKey]
    ) -> tuple[torch.export.ExportedProgram, _Marks]:
        example = self.others.asked.traced_example(places)
        leaves, spec = tree_flatten(example)
        marked = _MarkedModel(self.others.simulated, leaves, spec, known_as).eval()
        return self._exported(marked, example, places), marked.marks

    def replayed(self, places: frozenset[Place]) -> tuple[torch.export.ExportedProgram, SizeTrace]:
        """By the program that stands for the model at these sizes."""
        simulated, asked = self.others.simulated, self.others.asked
        example, vary = asked.traced_example(places), not places <= asked.batch
        tried = [*asked.other_counts(places), *(self.others.batches if vary else ())]
        program = _program_of(simulated, example, tried)
        if program is None:
            raise RuntimeError("the model's code chooses its calls by the values or sizes of its inputs")
        program, marks = with_inputs_as_given(program, simulated.model, example), _Marks(simulated)
        replayed = ReplayedModel(simulated, program, marks.change, marks.weight, marks.trace.enter).eval()
        return self._exported(replayed, example, places), marks.trace

    def _exported(self, marked: nn.Module, example: Batch, places: frozenset[Place]) -> torch.export.ExportedProgram:
        vary = torch.export.Dim.AUTO
        shapes = self.others.asked.shapes
        dims = tuple({axis: vary for axis in range(len(shapes[name])) if (name, axis) in places} for name in shapes)
        with tracing(), plain_mode(marked), restored(marked), _quiet(), AdaptivePools(), Recurrences():
            return torch.export.export(marked, tuple(tensors_of(example)), dynamic_shapes=(dims,), strict=False)

    def converted(self, program: torch.export.ExportedProgram) -> ir.Model:
        """The ONNX graph of an export. Raises InvalidRequest where ONNX has no form for it."""
        model = self.others.simulated.model
        try:
            with tracing(), plain_mode(model), restored(model), _quiet():
                exported = torch.onnx.export(program, dynamo=True, optimize=False, opset_version=OPSET, verbose=False)
                assert exported is not None
                return optimized(exported, DOMAIN)
        except CALL_ERRORS as error:
            raise not_exported(error) from error


def _program_of(simulated: SimulatedModel, example: Batch, others: Sequence[Batch]) -> Program | None:
    """The program that stands for a model, on ``others`` too; None where none does, as where values of inputs decide
    what is called.
    """
    program = record(simulated.model, example)
    return None if program.decides_by_values else replayable(program, simulated.model, example, others)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks on itself and on packages that are not installed out of the user's log, and what it
    logs of a failure that is raised too. The graph as far as it got, which it prints, is in the log at level DEBUG.
    """
    printed = StringIO()
    loggers = {logging.getLogger(name): level for name, level in _QUIETER.items()}
    levels = {logger: logger.level for logger in loggers}
    for logger, level in loggers.items():
        logger.setLevel(level)
    try:
        with warnings.catch_warnings(), redirect_stderr(printed):
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", "The tensor attributes? .* assigned during export")
            yield
    finally:
        if printed.getvalue():
            log.debug("while exporting: %s", printed.getvalue())
        for logger, level in levels.items():
            logger.setLevel(level)


def marks(graph: ir.Graph, kind: str) -> list[tuple[str, ir.Node]]:
    """(name, node) of every mark of a kind, in graph order."""
    return [(n.attributes["name"].as_string(), n) for n in graph if n.domain == DOMAIN and n.op_type == kind]
