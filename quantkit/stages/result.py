"""What quantizing gives back: a model that runs, the decision behind it, and the ways out to files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from quantkit.errors import InvalidRequest
from quantkit.plan import Plan, Profile
from quantkit.program.input_shapes import (
    InputShapes,
    distinct_forms,
    input_names,
    input_shapes,
    resized,
    varying_places,
)
from quantkit.program.inputs import Batch, as_batch
from quantkit.runtime.real import RealModel
from quantkit.simulation.model import SimulatedModel
from quantkit.simulation.quantized import QuantizedModel
from quantkit.store import require_writable
from quantkit.targets import DATA_FILES, OPERATOR_DOMAINS, Target
from quantkit.targets.instruction_sets import INSTRUCTION_SET, detected_instruction_set

if TYPE_CHECKING:
    from quantkit.backends.onnxruntime.dynamic import DynamicSizes, Named
    from quantkit.backends.onnxruntime.parity import Tolerance
    from quantkit.backends.onnxruntime.writer import ExportReport


@dataclass
class Result:
    """A quantized model, the plan it obeys and what was measured on it.

    ``model`` runs like the original, with its attributes and methods: simulated in float, or, after ``to_real``, on
    integer kernels. ``quantized`` is what carries it out, with codes and ranges by name. ``metrics``
    compares it with the float model: on the calibration inputs, and on the user's own metric where ``evaluate`` was
    given. ``folds`` are the (layer, BatchNorm) pairs that were folded, ``calibration`` the inputs it was made with
    (empty when it was loaded). ``curve`` has the (cost, metric drop) of every plan that was applied for a limit on
    accuracy, cheapest first. ``notes`` say how each layer was rounded, what was learned afterwards, and under
    "notices" what was said on the way. ``shapes`` has the shapes of the inputs, by name, of a few batches of
    calibration data between which everything varies that varies among all (empty where nothing but the number of
    samples does): these sizes vary in an ONNX file, and so do those that a recipe names, ``dynamic``. With
    ``external_data`` the recipe wants the file's tensors apart from it.
    """

    quantized: SimulatedModel | RealModel
    plan: Plan
    folds: tuple[tuple[str, str], ...] = ()
    calibration: Sequence[Batch] = ()
    profile: Profile | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    curve: tuple[tuple[float, float], ...] = ()
    shapes: tuple[InputShapes, ...] = ()
    dynamic: Named = field(default_factory=dict)
    external_data: bool = False

    @cached_property
    def model(self) -> QuantizedModel:
        """The quantized model as its user knows it."""
        return QuantizedModel.of(self.quantized)

    def save(self, folder: str | Path) -> Path:
        """Write plan.json and weights.safetensors into ``folder``; ``quantkit.load`` reads them back."""
        from quantkit.stages.save_load import save_result

        return save_result(self.simulated(), self.plan, self.folds, folder, self.shapes)

    def save_pretrained(self, folder: str | Path, tokenizer: Any = None) -> Path:
        """Write a folder that ``from_pretrained`` of transformers loads, as float weights with the values of their
        codes, and ``quantkit.load`` too; with a ``tokenizer`` its files. Raises InvalidRequest where a float model
        would compute something else, as with activations in codes.
        """
        from quantkit.stages.pretrained import Saved, save_pretrained

        example = self.calibration[0] if self.calibration else None
        return save_pretrained(Saved(self.simulated(), self.folds, example, self.save), folder, tokenizer)

    def to_real(self, expand: bool = False) -> Result:
        """This result with a model that computes on integers from packed weights, which take the plan's bytes, on the
        CPU.

        ``expand`` also keeps 8-bit expansions of the weights that kernels cannot read as they are packed: faster, and
        counted apart in ``quantized.expanded_bytes``.
        """
        return replace(self, quantized=RealModel(self.simulated().on_cpu(), expand))

    def simulated(self) -> SimulatedModel:
        """The model in simulation: differentiable, and what files are written from."""
        return self.quantized.simulated() if isinstance(self.quantized, RealModel) else self.quantized

    def export_onnx(
        self,
        path: str | Path,
        *,
        example: Any = None,
        check: Sequence[Any] = (),
        tolerance: Tolerance | None = None,
        dynamic: Named | None = None,
        external_data: bool | None = None,
    ) -> ExportReport:
        """Write an ONNX file for onnxruntime and compare it there with ``model`` before the call returns.

        ``example`` is one batch of model inputs (default: the first calibration batch), ``check`` the batches to
        compare on (default: the example). The number of samples may vary in the file, every size that varies in the
        calibration data, and those that ``dynamic`` names, as in ``{"input_ids": {1: "sequence"}}``; each is compared
        at a second size too. A notice says which of them the model's code fixes.

        Above 2 GiB, and with ``external_data``, tensors lie in a second file, ``<path>.data``: keep both in one folder
        under their names. Raises ParityError, and leaves no file, when they differ by more than ``tolerance``;
        InvalidRequest when the model cannot be exported, or not with a size that ``dynamic`` names.
        """
        from quantkit.backends.onnxruntime.parity import DEFAULT_TOLERANCE
        from quantkit.backends.onnxruntime.writer import ExportOptions, export_onnx

        if (made_for := self.plan.provenance.get("target")) in DATA_FILES:
            Target.load(made_for).require_files()
        require_writable(Path(path).parent)
        batch = self.example() if example is None else as_batch(example)
        checked = [as_batch(item) for item in check]
        sizes = self.dynamic_sizes(batch, dynamic)
        apart = self.external_data if external_data is None else external_data
        options = ExportOptions(
            self.instruction_set, checked, tolerance or DEFAULT_TOLERANCE, self.plan,
            sizes=sizes, external_data=apart, domains=self.operator_domains,
        )  # fmt: skip
        return export_onnx(self.simulated().on_cpu(), batch, path, options)

    def dynamic_sizes(self, example: Batch, named: Named | None = None) -> DynamicSizes:
        """The sizes that are to vary in a file: those that the user names, and of the calibration data the batches
        that show them, or the example made as they were.
        """
        from quantkit.backends.onnxruntime.dynamic import DynamicSizes

        model, wanted = self.simulated().model, self.dynamic if named is None else named
        if self.calibration:
            chosen = distinct_forms([input_shapes(model, batch) for batch in self.calibration])
            return DynamicSizes(wanted, [self.calibration[i] for i in chosen])
        names = input_names(model, example)
        fitting = [form for form in self.shapes if form.keys() == set(names)]
        varying = varying_places(fitting)
        sizes = [{(name, axis): form[name][axis] for name, axis in varying} for form in fitting]
        return DynamicSizes(wanted, [resized(example, names, one) for one in sizes])

    @property
    def instruction_set(self) -> str:
        """That of the CPUs that files are written for: the plan's, or this machine's where an earlier version made
        the plan.
        """
        return str(self.plan.provenance.get(INSTRUCTION_SET) or detected_instruction_set())

    @property
    def operator_domains(self) -> tuple[str, ...]:
        """The operator sets that files may use beside ONNX's own: none where an earlier version made the plan."""
        return tuple(self.plan.provenance.get(OPERATOR_DOMAINS, ()))

    def example(self) -> Batch:
        """The first calibration batch; raises InvalidRequest where the result was loaded without data."""
        if not self.calibration:
            raise InvalidRequest(
                "A loaded result carries no calibration data: pass example=, one batch of model inputs, to export it."
            )
        return self.calibration[0]


def export_onnx(result: Result, path: str | Path, **options: Any) -> ExportReport:
    """``result.export_onnx(path, ...)``."""
    return result.export_onnx(path, **options)


def load_result(folder: str | Path, model: nn.Module) -> Result:
    """The result saved in ``folder``, on a copy of ``model``, a float model of the same architecture."""
    from quantkit.stages.save_load import load_result

    simulated, plan, folds, shapes = load_result(folder, model)
    simulated.eval()
    return Result(simulated, plan, folds, shapes=shapes)
