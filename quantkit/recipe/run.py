"""Carrying out a recipe: everything is read and checked first, then quantized, written, and measured in
onnxruntime.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from torch import nn

from quantkit.allocation.solve import require_solver
from quantkit.api import profile, quantize
from quantkit.budget import Budget
from quantkit.errors import InvalidRequest
from quantkit.plan import Plan, Profile
from quantkit.program.input_shapes import input_shapes
from quantkit.program.inputs import digests_of_samples, split_batches
from quantkit.progress import warn
from quantkit.recipe.read import DECIDED_LATER, SECTIONS, Recipe, read_recipe
from quantkit.recipe.sources import Evaluate, Samples, evaluate_of, model_of, outputs_of, samples_of
from quantkit.report.summary import Measured
from quantkit.stages.bench import LATENCY_BATCH, bench
from quantkit.stages.inputs import calibration_batches
from quantkit.stages.measure_plans import measured_damages
from quantkit.stages.metric import metric_of
from quantkit.stages.operating_point import EFFORTS
from quantkit.stages.options import asked_transforms, choices, choose
from quantkit.stages.quantize import candidates_of
from quantkit.stages.request import DEFAULT_TARGET
from quantkit.stages.result import Result, load_result
from quantkit.store import data_file, require_writable, write_atomically
from quantkit.targets import Target
from quantkit.targets.rules import parse_schemes

if TYPE_CHECKING:
    from quantkit.backends.onnxruntime.dynamic import Named

ONNX_FILE = "model.onnx"
RECIPE_FILE = "recipe.yaml"
PROFILE_FILE = "profile.safetensors"
TARGET_FILE = "target.yaml"
CHECKED_BATCHES = 2
EXECUTIONS = ("simulated", "real")


@dataclass(frozen=True)
class Inputs:
    """What a recipe names, read and checked; None for what it does not."""

    model: nn.Module
    calibration: Samples | None
    example: Samples | None
    evaluate: Evaluate | None
    evaluation: Samples | None

    def shown(self) -> dict[str, Any]:
        """The arguments that say what inputs look like."""
        return {
            "calibration": None if self.calibration is None else items_of(self.calibration),
            "example_inputs": None if self.example is None else items_of(self.example)[0],
        }


def inputs_of(recipe: Recipe) -> Inputs:
    """The recipe's model and data; raises InvalidRequest, with the line, for what cannot be had."""
    _check_names(recipe)
    model = model_of(recipe)
    calibration, example = (_samples(recipe, section, model) for section in ("calibration", "example_inputs"))
    found = evaluate_of(recipe)
    if found is not None and found[1] is not None and calibration is not None:
        _tell_shared_rows(calibration, found[1])
    return Inputs(model, calibration, example, *(found or (None, None)))


def _tell_shared_rows(calibration: Samples, evaluation: Samples) -> None:
    """A warning where the metric is measured on samples that the model is quantized on."""
    known = {row for batch in calibration.batches for row in digests_of_samples(batch)}
    rows = [row for batch in evaluation.batches for row in digests_of_samples(batch)]
    if shared := sum(row in known for row in rows):
        warn(
            f"{shared} of {len(rows)} samples to evaluate on are calibration samples too: the metric comes out better "
            "than on new data. Select others for one of them."
        )


def _check_names(recipe: Recipe) -> None:
    """The budget and the names a recipe chooses, checked where their lines are known."""
    with recipe.blame("target"):
        target = Target.load(recipe.target or DEFAULT_TARGET)
    with recipe.blame("budget"):
        limit = Budget.parse(recipe.get("budget"))
        if limit.scheme is not None:
            parse_schemes([limit.scheme], target)
    with recipe.blame("schemes"):
        parse_schemes(candidates_of(limit, recipe.get("schemes"))["schemes"], target)
    if recipe.get("transforms") is not None:
        with recipe.blame("transforms"):
            asked_transforms(recipe.get("transforms"))
    if recipe.get("solver") is not None:
        with recipe.blame("solver"):
            require_solver(recipe.get("solver"))
    for key, known in {**choices(), "effort": tuple(EFFORTS)}.items():
        if recipe.get(key) is not None:
            with recipe.blame(key):
                choose(key, recipe.get(key), known)


def items_of(samples: Samples) -> list[Any]:
    """Samples as the calibration argument of ``quantize``."""
    return [kwargs or args for args, kwargs in samples.batches]


def _samples(recipe: Recipe, section: str, model: nn.Module) -> Samples | None:
    """What a section names, as the model takes it; None where the recipe has no such section."""
    return None if recipe.get(section) is None else samples_of(recipe, section, model)


def _calibration(recipe: Recipe, model: nn.Module, what: str) -> list[Any]:
    """The calibration data, for ``what`` cannot do without."""
    found = _samples(recipe, "calibration", model)
    if found is None:
        raise InvalidRequest(f"{recipe.path}: {what} runs the model on data: add the key 'calibration'.")
    return items_of(found)


def run_recipe(recipe: Recipe, progress: bool = True) -> tuple[Result, Measured | None]:
    """Quantize by the recipe; leaves model.onnx, plan.json, weights.safetensors and the recipe in its output folder.

    Without an input to show the model there is no model.onnx, and nothing measured on it.
    """
    folder = require_writable(recipe.output)
    inputs = inputs_of(recipe)
    dynamic = dynamic_of(recipe, inputs)
    result = quantize(
        inputs.model,
        **inputs.shown(),
        evaluate=inputs.evaluate,
        progress=progress,
        workdir=recipe.workdir,
        **recipe.settings(),
    )
    result.dynamic, result.external_data = dynamic, _external_data(recipe)
    for earlier in (folder / ONNX_FILE, data_file(folder / ONNX_FILE)):
        earlier.unlink(missing_ok=True)  # that of an earlier run would not be the plan's
    result.save(folder)
    record(recipe, folder)
    return result, export_and_measure(result, inputs, folder / ONNX_FILE) if result.calibration else None


def dynamic_of(recipe: Recipe, inputs: Inputs) -> Named:
    """The sizes of inputs that the recipe names; raises InvalidRequest for inputs and axes that there are not."""
    from quantkit.backends.onnxruntime.dynamic import named_places

    named = recipe.get("export", "dynamic", default={})
    shown = inputs.calibration or inputs.example
    if named and shown is not None:
        with recipe.blame("export", "dynamic"):
            first = calibration_batches(inputs.model, items_of(shown)[:1], None)[0]
            named_places(named, input_shapes(inputs.model, first))
    return named


def _external_data(recipe: Recipe) -> bool:
    return bool(recipe.get("export", "external_data", default=False))


def profile_recipe(recipe: Recipe, path: Path | None, progress: bool = True) -> tuple[Profile, Path]:
    """Only the profile of a recipe, written to ``path`` (default: profile.safetensors in its output folder)."""
    path = path or recipe.output / PROFILE_FILE
    require_writable(path.parent)
    inputs = inputs_of(recipe)
    measured = profile(
        inputs.model, **inputs.shown(), progress=progress, workdir=recipe.workdir, **_measuring_settings(recipe)
    )
    return measured, measured.save(path)


def measure_plans(recipe: Recipe, measured: Profile, plans: Sequence[Plan], progress: bool = True) -> list[float]:
    """Damage of plans on the inputs of the recipe that the profile ``measured`` is of."""
    _check_names(recipe)
    model, settings = model_of(recipe), _measuring_settings(recipe)
    calibration = _calibration(recipe, model, "measuring plans")
    return measured_damages(measured, plans, model, calibration, progress=progress, **settings)


def _measuring_settings(recipe: Recipe) -> dict[str, Any]:
    return {key: value for key, value in recipe.settings().items() if key not in DECIDED_LATER}


def bench_recipe(
    recipe: Recipe, path: Path | None, threads: int, batch: int, seconds: float, progress: bool = True
) -> tuple[Target, Path]:
    """The recipe's target with the latency table of its model on this machine, written to ``path`` (default:
    target.yaml in its output folder).
    """
    path = path or recipe.output / TARGET_FILE
    require_writable(path.parent)
    with recipe.blame("target"):
        target = Target.load(recipe.target or DEFAULT_TARGET)
    model = model_of(recipe)
    items = _calibration(recipe, model, "bench")
    measured = bench(model, items, target=target, threads=threads, batch=batch, seconds=seconds, progress=progress)
    return measured, measured.save(path)


def export_and_measure(result: Result, inputs: Inputs, path: Path) -> Measured:
    """Write the ONNX file, and measure size, speed and accuracy of it and of the float network in onnxruntime."""
    from quantkit.backends.onnxruntime.latency import measure_latency_ratio
    from quantkit.backends.onnxruntime.marks import mark_graph
    from quantkit.backends.onnxruntime.model_files import size_on_disk
    from quantkit.backends.onnxruntime.onnx_model import OnnxModel
    from quantkit.backends.onnxruntime.writer import ExportOptions, export_float, export_onnx

    example = result.example()
    simulated = result.simulated()
    graph = mark_graph(simulated, example, result.dynamic_sizes(example))
    checked = result.calibration[:CHECKED_BATCHES]
    options = ExportOptions(
        result.instruction_set, checked, plan=result.plan, graph=graph,
        external_data=result.external_data, domains=result.operator_domains,
    )  # fmt: skip
    report = export_onnx(simulated, example, path, options)
    metrics = dict(result.metrics)
    if inputs.evaluate is not None:
        metrics["onnx"] = metric_of(inputs.evaluate, OnnxModel(path))
    if inputs.evaluation is not None:
        metrics["agreement"] = agreement(result.model, OnnxModel(path), inputs.evaluation)
    table = None if result.profile is None else result.profile.latency
    size, threads = (LATENCY_BATCH, 1) if table is None else (table.batch, table.threads)
    batch = split_batches(result.calibration, size)[0]
    with tempfile.TemporaryDirectory() as folder:
        floating = export_float(simulated, example, Path(folder) / "float.onnx", graph=graph)
        latency = measure_latency_ratio(floating, path, batch, threads=threads)
        float_bytes = size_on_disk(floating)
    return Measured(
        float_bytes=float_bytes,
        quantized_bytes=report.file_bytes,
        weight_bytes=report.weight_bytes,
        latency_ratio=latency.ratio,
        latency_batch=size,
        metrics=metrics,
        minimum_runtime=report.minimum_runtime,
    )


def agreement(one: nn.Module, other: nn.Module, samples: Samples) -> float:
    """Percent of samples on which two models have the same largest output."""
    pairs = zip(outputs_of(one, samples), outputs_of(other, samples), strict=True)
    same = np.concatenate([(a.argmax(-1) == b.argmax(-1)).cpu().numpy().reshape(-1) for a, b in pairs])
    return float(100 * same.mean())


def record(recipe: Recipe, folder: Path) -> Path:
    """Keep the recipe beside its results, paths spelled out, so that ``load`` can build the model again."""
    data = _absolute(recipe, recipe.data)
    text = yaml.safe_dump(data, sort_keys=False)
    return write_atomically(folder / RECIPE_FILE, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def _absolute(recipe: Recipe, data: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's data with every path of an input absolute."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        if key in ("weights", "npz", "text"):
            found[key] = str(recipe.resolved(value))
        elif key == "tokenizer":
            found[key] = str(path) if (path := recipe.resolved(value)).exists() else _absolute_function(recipe, value)
        elif key in ("python", "preprocess"):
            found[key] = _absolute_function(recipe, value)
        elif key in SECTIONS:
            found[key] = _absolute(recipe, value)
        elif key == "target":
            found[key] = recipe.target
        else:
            found[key] = value
    return found


def _absolute_function(recipe: Recipe, text: str) -> str:
    """A function of a file, or of a module beside the recipe, with that file's absolute path; others as they are."""
    place, _, function = text.rpartition(":")
    beside = "." not in place and recipe.resolved(f"{place}.py").is_file()
    if beside or place.endswith(".py"):
        return f"{recipe.resolved(f'{place}.py' if beside else place)}:{function}"
    return text


def load(folder: str | Path, model: nn.Module | None = None, *, execution: str = "simulated") -> Result:
    """The result saved in ``folder``, bit for bit.

    ``model`` is a float model of the same architecture (its weights do not matter, buffers that its ``state_dict``
    leaves out and its type do; it is copied); it is not needed where a recipe made the folder, which then also gives
    the calibration data for ``export_onnx``. ``execution`` is "simulated" (float, differentiable) or "real" (packed
    weights on integer kernels). Raises InvalidRequest where files are missing or do not belong to the model,
    CorruptFile where they are damaged.
    """
    choose("execution", execution, EXECUTIONS)
    result = load_result(folder, model) if model is not None else _load_by_recipe(folder)
    return result.to_real() if execution == "real" else result


def _load_by_recipe(folder: str | Path) -> Result:
    """The result of a folder that a recipe made, with its calibration data."""
    if not Path(folder).is_dir():
        raise InvalidRequest(f"Cannot load a result: there is no folder {str(folder)!r}.")
    if not (Path(folder) / RECIPE_FILE).exists():
        raise InvalidRequest(
            f"{str(folder)!r} was not made by a recipe, so it does not say how to build the model: pass model=, a "
            "float model of the same architecture."
        )
    recipe = read_recipe(Path(folder) / RECIPE_FILE)
    model = model_of(recipe)
    result = load_result(folder, model)
    samples = _samples(recipe, "calibration", model) or _samples(recipe, "example_inputs", model)
    result.dynamic = recipe.get("export", "dynamic", default={})
    result.external_data = _external_data(recipe)
    if samples is not None:
        result.calibration = calibration_batches(model, items_of(samples), recipe.get("samples"))
    return result
