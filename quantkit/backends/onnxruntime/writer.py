"""Write a simulated model as an ONNX file for onnxruntime, and prove it there before the file appears.

The file computes on UINT8 activations and INT8 weights stored at their true width; its graph is named after the
model's modules and carries nothing of the exporter. See ``weight_forms`` for the storage forms and ``parity`` for the
proof.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir

from quantkit.backends.onnxruntime.dynamic import DynamicSizes
from quantkit.backends.onnxruntime.editing import copy_tidy, remove_leftovers
from quantkit.backends.onnxruntime.half_initializers import store_as_halves
from quantkit.backends.onnxruntime.marks import OPSET, MarkedGraph, mark_graph
from quantkit.backends.onnxruntime.model_files import model_files, size_on_disk
from quantkit.backends.onnxruntime.parity import (
    DEFAULT_TOLERANCE,
    OutputParity,
    Tolerance,
    beyond_by_own_noise,
    measure_parity,
    require_parity,
)
from quantkit.backends.onnxruntime.rewrite import bypass_marks, quantize_marks
from quantkit.backends.onnxruntime.run_in_float import layers_in_float
from quantkit.backends.onnxruntime.weight_forms import minimum_runtime
from quantkit.errors import InvalidRequest
from quantkit.plan import Plan
from quantkit.program.input_shapes import InputShapes, input_shapes, varying_places
from quantkit.program.inputs import Batch
from quantkit.progress import notice
from quantkit.simulation.model import SimulatedModel
from quantkit.store import write_with_data
from quantkit.targets.instruction_sets import AVX2

_RUNTIME = "quantkit.minimum_onnxruntime"
_USUAL_NAME = "model.onnx"


@dataclass(frozen=True)
class ExportReport:
    """What was written and how it compares.

    ``file_bytes`` is the file's size, with that of the file of its tensors where there is one, ``stored_bytes`` the
    bytes in them of all tensors, initializers and constants, ``weight_bytes`` those of all layers' weights, scales
    included, counted from its initializers. ``dynamic_batch`` is False where the model runs at one batch size only.
    ``layers_in_float`` are quantized layers that onnxruntime has no integer kernel for as they stand in the graph.
    ``dynamic`` has the name of every size that varies, by input and axis, ``conditions`` what the model's code needs
    of them.
    """

    path: Path
    file_bytes: int
    weight_bytes: int
    stored_bytes: int
    minimum_runtime: str
    dynamic_batch: bool
    parity: tuple[OutputParity, ...]
    opset: int = OPSET
    layers_in_float: tuple[str, ...] = ()
    dynamic: dict[str, dict[int, str]] = field(default_factory=dict)
    conditions: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExportOptions:
    """How a file is written: the ``instruction_set`` of the CPUs that it is for, ``check``, the batches to compare on
    (default: the example), and the ``plan`` whose digest its metadata has. ``sizes`` are those of the inputs that are
    to vary. ``graph`` is what ``mark_graph`` made earlier of the same model, to export it once for several files.
    With ``external_data`` tensors lie in a second file even where one could hold them. ``domains`` are operator sets
    that it may use beside ONNX's own.
    """

    instruction_set: str = AVX2
    check: Sequence[Batch] = ()
    tolerance: Tolerance = DEFAULT_TOLERANCE
    plan: Plan | None = None
    graph: MarkedGraph | None = field(default=None, repr=False)
    sizes: DynamicSizes = field(default_factory=DynamicSizes, repr=False)
    external_data: bool = False
    domains: tuple[str, ...] = ()


def export_onnx(
    simulated: SimulatedModel, example: Batch, path: str | Path, options: ExportOptions | None = None
) -> ExportReport:
    """Write ``simulated`` to ``path`` and compare the file with it in onnxruntime.

    ``example`` is a batch (args, kwargs) of at least one sample; the file takes any number of samples where the model
    does, and the other sizes that are to vary. Those are compared at a second size, too. Where tensors do not fit into
    one file, or with ``external_data``, they lie in ``<path>.data``, which has to stay beside it.

    Memory, beyond the simulated model: its codes as they are stored; one more copy of all tensors while one file is
    written, of the largest for two; then what onnxruntime makes of the file, one session at a time. Raises ParityError
    when the file computes something else, and InvalidRequest when the model cannot be exported, or does not take a
    batch of ``check``; then no file is left.
    """
    how = options or ExportOptions()
    marked = how.graph or mark_graph(simulated, example, how.sizes)
    batches = compared_batches(simulated, marked, how.check or [example])
    model = _described(simulated, marked, how)
    parity: list[OutputParity] = []
    in_float: list[str] = []

    def write_and_compare(temporary: Path) -> None:
        model_files(model, temporary.name, how.external_data).write(temporary)
        with TemporaryDirectory(dir=temporary.parent) as folder:  # where there is room for it
            optimized = Path(folder) / "optimized.onnx"
            parity.extend(measure_parity(temporary, simulated, batches, how.tolerance, save_optimized=optimized))
            in_float.extend(layers_in_float(optimized, simulated))
            if noisy := beyond_by_own_noise(parity, how.tolerance):
                _require_parity_in_float(simulated, marked, batches, how, Path(folder) / "float.onnx")
                _tell_noise(max(noisy, key=lambda one: one.relative_error))
            else:
                require_parity(parity, how.tolerance)

    written = write_with_data(path, write_and_compare)
    if in_float:
        notice(
            f"onnxruntime runs {', '.join(in_float[:5])}{' and others' * (len(in_float) > 5)} in float, on weights "
            "that it expands at load: these layers are small in the file, and no faster"
        )
    return ExportReport(
        path=written,
        file_bytes=size_on_disk(written),
        weight_bytes=_weight_bytes(model, simulated),
        stored_bytes=_stored_bytes(model),
        minimum_runtime=model.metadata_props[_RUNTIME],
        dynamic_batch=bool(marked.batched),
        parity=tuple(parity),
        layers_in_float=tuple(in_float),
        dynamic=marked.taken.by_input(),
        conditions=marked.taken.texts(),
    )


def _tell_noise(worst: OutputParity) -> None:
    notice(
        f"output {worst.output!r} of the file differs by {worst.relative_error:.1%}; under another rounding of its "
        f"sums the model differs from itself by {worst.rounding_noise:.1%}. With activations in float, where nothing "
        "rounds, file and model are the same"
    )


def _require_parity_in_float(
    simulated: SimulatedModel, marked: MarkedGraph, batches: Sequence[Batch], how: ExportOptions, path: Path
) -> None:
    """Compare the same graph and codes of weights with all activations in float; raises ParityError where that
    computes something else.
    """
    floats = SimulatedModel(
        simulated.model, simulated.sites, simulated.weights, {}, simulated.floats, simulated.updated
    ).eval()
    model_files(quantized_graph(floats, marked, how), path.name, how.external_data).write(path)
    require_parity(measure_parity(path, floats, batches, how.tolerance), how.tolerance)


def length_of(simulated: SimulatedModel, marked: MarkedGraph, options: ExportOptions) -> int:
    """Bytes of what ``export_onnx`` would write; where the graph names a second file, with the usual name."""
    return model_files(_described(simulated, marked, options), _USUAL_NAME, options.external_data).file_bytes


def _described(simulated: SimulatedModel, marked: MarkedGraph, options: ExportOptions) -> ir.Model:
    """The graph with what its metadata says of it."""
    model = quantized_graph(simulated, marked, options)
    runtime = minimum_runtime(weight.format.bits for weight in simulated.weights.values())
    model.metadata_props[_RUNTIME] = runtime
    if options.plan is not None:
        model.metadata_props["quantkit.plan"] = options.plan.digest()
    return model


def compared_batches(simulated: SimulatedModel, marked: MarkedGraph, given: Sequence[Batch]) -> list[Batch]:
    """The batches that a file is compared on: those given, and others where all of these have one size that varies in
    the file. Raises InvalidRequest for one that the file does not take.
    """
    shapes = [_taken_shapes(simulated, marked, batch, number) for number, batch in enumerate(given)]
    batches = list(given)
    for other in marked.others:
        form = input_shapes(simulated.model, other)
        varied = varying_places(shapes) | {(name, 0) for name in marked.batched}
        if (varying_places([shapes[0], form]) & marked.taken.dynamic) - varied:
            batches.append(other)
            shapes.append(form)
    return batches


def _taken_shapes(simulated: SimulatedModel, marked: MarkedGraph, batch: Batch, number: int) -> InputShapes:
    """The shapes of a batch's tensors; raises InvalidRequest where the file does not take them."""
    shapes = input_shapes(simulated.model, batch)
    ranks = {name: len(shape) for name, shape in shapes.items()}
    wanted = Counter(name for name, _ in marked.taken.sizes)
    problem = None
    if set(shapes) != set(marked.inputs):
        problem = f"it has {', '.join(shapes) or 'no tensors'}, and the file takes {', '.join(marked.inputs)}"
    elif wrong := next((name for name in marked.inputs if ranks[name] != wanted[name]), None):
        problem = f"{wrong!r} has {ranks[wrong]} axes, and the file takes {wanted[wrong]}"
    else:
        problem = marked.taken.problem(shapes)
    if problem is not None:
        raise InvalidRequest(
            f"Batch {number} of check= cannot be run on the file: {problem}. The file takes the sizes of the example; "
            "those vary that vary in the calibration data, and that are named, as in "
            f"dynamic={{{marked.inputs[0]!r}: {{1: 'sequence'}}}}."
        )
    return shapes


def quantized_graph(simulated: SimulatedModel, marked: MarkedGraph, options: ExportOptions) -> ir.Model:
    """The graph of ``simulated`` in integers, from the marked graph of its model."""
    model = copy_tidy(marked)
    given = list(model.graph.initializers.values())
    quantize_marks(model, simulated, options.instruction_set, options.domains)
    remove_leftovers(model)
    if simulated.half_floats:
        parts = [f"{name}.weight" for name in simulated.floats.layers if name not in simulated.weights]
        made = [model.graph.initializers[name] for name in parts if name in model.graph.initializers]
        store_as_halves(model.graph, dict.fromkeys([*given, *made]))
    return model


def write_unchecked(simulated: SimulatedModel, marked: MarkedGraph, path: Path, options: ExportOptions) -> Path:
    """Write ``simulated`` to be timed: nothing compares what it computes."""
    model_files(quantized_graph(simulated, marked, options), path.name).write(path)
    return path


def export_float(
    simulated: SimulatedModel, example: Batch, path: str | Path, *, graph: MarkedGraph | None = None
) -> Path:
    """Write the same graph in float32, to compare size and speed with. Its weights are the simulated model's."""
    model = copy_tidy(graph or mark_graph(simulated, example))
    bypass_marks(model.graph)
    remove_leftovers(model)
    return write_with_data(path, lambda temporary: model_files(model, temporary.name).write(temporary))


def _stored_bytes(model: ir.Model) -> int:
    """Bytes of all tensors in the graph: initializers and the values of constants."""
    tensors = [v.const_value for v in model.graph.initializers.values()]
    constants = [node.attributes.get("value") for node in model.graph if node.op_type == "Constant"]
    tensors += [attribute.as_tensor() for attribute in constants if attribute is not None]
    return sum(int(tensor.nbytes) for tensor in tensors if tensor is not None)


def _weight_bytes(model: ir.Model, simulated: SimulatedModel) -> int:
    """Bytes of the initializers that hold the layers' weights: codes in whatever form, scales, float weights."""
    names = {f"{name}.weight" for name in simulated.weights}
    names |= {weight.parameter for weight in simulated.floats.layers.values() if weight.parameter is not None}
    parts = tuple(f"{name}." for name in names)
    tensors = [(str(v.name), v.const_value) for v in model.graph.initializers.values()]
    return sum(int(t.nbytes) for name, t in tensors if t is not None and (name in names or name.startswith(parts)))
