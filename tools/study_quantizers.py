"""How much of the float network is left? Methods of rounding and learning at several bits, on unseen images.

    python tools/study_quantizers.py [--models resnet20 resnet8 mobilenetv1] [--schemes w2a8 w3a8 w4a8 w4a4]
                                     [--methods nearest gptq network block] [--draws 1] [--share 1] [--onnx]

Every layer gets the scheme, the first one reads 8 bits. Quantized on unlabelled training images, measured on images
that decided nothing: KL divergence from the float network, the share of equal answers, top-1 where there are labels,
seconds of `quantkit.apply`, its peak of memory and what it said before that it would be. `--draws 3` takes the mean
over three seeds, which also draw the calibration images where only a `--share` of them is used. `--budgets 3 2.5` adds
mixed plans from a profile of 2 to 8 bits. `--onnx` also exports, and gives top-1 (without labels, the share of equal
answers) in onnxruntime.

    python tools/study_quantizers.py --no-data [--models ...] [--budgets 4.5]

Weights alone, without a single input: uniform widths to nearest and by HQQ, and plans of these average bits by each
estimator that needs no data.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from golden_run import recipe_model
from safetensors.torch import load_file
from torch import Tensor, nn

import quantkit
from quantkit.backends.onnxruntime.onnx_model import OnnxModel
from quantkit.program.layers import layer_kind
from quantkit.sensitivity import NO_INPUTS
from quantkit.sensitivity.damage import kl_rows

REPOSITORY = Path(__file__).resolve().parent.parent
CHUNK = 250
QUANTIZED_BY: dict[str, dict[str, str]] = {
    "nearest": {"rounding": "nearest", "reconstruction": "none", "correction": "none"},
    "gptq": {"rounding": "gptq", "reconstruction": "none", "correction": "none"},
    "gptaq": {"rounding": "gptaq", "reconstruction": "none", "correction": "none"},
    "adaround": {"rounding": "adaround", "reconstruction": "none", "correction": "none"},
    "signround": {"rounding": "signround", "reconstruction": "none", "correction": "none"},
    "hqq": {"rounding": "hqq", "reconstruction": "none", "correction": "none"},
    "corrected": {"rounding": "gptq", "reconstruction": "none", "correction": "auto"},
    "adaquant": {"rounding": "nearest", "reconstruction": "adaquant", "correction": "none"},
    "parallel": {"rounding": "nearest", "reconstruction": "adaquant-parallel", "correction": "none"},
    "calibtip": {"rounding": "nearest", "reconstruction": "adaquant", "correction": "auto"},
    "network": {"rounding": "gptq", "reconstruction": "network"},
    "block": {"rounding": "gptq", "reconstruction": "block"},
    "confident": {"rounding": "gptq", "reconstruction": "block", "correction": "confidence"},
}
CIFAR = ("cifar10_calib.npz", "images", "cifar10_test_a.npz", "images", "labels")
VWW = ("vww_images.npz", "calib", "vww_images.npz", "eval", None)
# model -> weights, file and array of calibration images, file and array of evaluation images, array of labels
SOURCES = {
    "resnet20": ("resnet20.safetensors", *CIFAR),
    "resnet8": ("resnet8_mlperf.safetensors", *CIFAR),
    "mobilenetv1": ("mobilenetv1_025_vww.safetensors", *VWW),
}
MIXED = ("w2", "w3", "w4", "w5", "w6", "w8")


@dataclass(frozen=True)
class Case:
    """A float network, calibration images, unseen images and what it says of them, and their labels if any."""

    model: nn.Module
    calibration: Tensor
    unseen: Tensor
    wanted: Tensor
    labels: Tensor | None

    def measured(self, result: quantkit.Result, runtime: bool) -> dict[str, float]:
        """Figures of a quantized model on the unseen images, with ``runtime`` also in onnxruntime."""
        found, answers = outputs(result.model, self.unseen), self.wanted.argmax(-1)
        figures = {
            "KL": float(kl_rows(self.wanted.log_softmax(-1), found.log_softmax(-1)).mean()),
            "same": equal_answers(found, answers),
        }
        if self.labels is not None:
            answers = self.labels
            figures["top1"] = equal_answers(found, answers)
        if runtime:
            figures["runtime"] = equal_answers(outputs_in_onnxruntime(result, self.unseen), answers)
        return figures


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(part) for part in images.split(CHUNK)])


def outputs_in_onnxruntime(result: quantkit.Result, images: Tensor) -> Tensor:
    """What the exported model says."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        result.export_onnx(path)
        return outputs(OnnxModel(path), images)


def equal_answers(found: Tensor, answers: Tensor) -> float:
    """How often the likeliest class is the one wanted, in percent."""
    return 100 * float((found.argmax(-1) == answers).float().mean())


def case_of(name: str, data: Path, unseen: int | None) -> Case:
    weights, seen_file, seen, unseen_file, array, labels = SOURCES[name]
    recipe = recipe_model(name)
    model = recipe.build()
    model.load_state_dict(load_file(data / weights))
    held = np.load(data / unseen_file)
    images = recipe.preprocess(held[array][:unseen])
    known = None if labels is None else torch.from_numpy(held[labels][:unseen]).long()
    calibration = recipe.preprocess(np.load(data / seen_file)[seen])
    return Case(model, calibration, images, outputs(model, images), known)


def uniform(case: Case, scheme: str) -> dict[str, str]:
    """Every layer at ``scheme``, the first one reading 8 bits."""
    names = [name for name, module in case.model.named_modules() if layer_kind(module) is not None]
    plan = dict.fromkeys(names, scheme)
    return plan | {names[0]: f"{scheme.partition('a')[0]}a8"}


def run(
    case: Case, plan: quantkit.Plan | Mapping[str, str], method: str, options: argparse.Namespace
) -> dict[str, float]:
    """The figures of a plan met by a method, the mean over draws of the calibration images."""
    rows = []
    for draw in range(options.draws):
        images = case.calibration
        if options.share < 1:
            chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(draw))
            images = images[chosen[: round(options.share * len(images))]]
        start, held = time.perf_counter(), resident_mb(reset=True)
        result = quantkit.apply(case.model, plan, images, seed=draw, progress=False, **QUANTIZED_BY[method])
        seconds, taken = time.perf_counter() - start, peak_mb() - held
        said = result.notes.get("working_bytes", float("nan")) / 1e6
        rows.append(case.measured(result, options.onnx) | {"seconds": seconds, "MB": taken, "said": said})
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def mixed_plans(case: Case, budgets: Sequence[str], activation: str) -> dict[str, quantkit.Plan]:
    """Plans of these average bits, from one profile; the first layer reads 8 bits."""
    schemes = [f"{weight}{activation}" for weight in MIXED]
    first = next(iter(uniform(case, "w4a8")))
    rules = {first: [f"{weight}a8" for weight in MIXED]}
    profile = quantkit.profile(case.model, case.calibration, schemes=schemes, rules=rules, progress=False)
    return {f"{b} bits {activation}": quantkit.allocate(profile, f"{b} bits") for b in budgets}


def without_data(case: Case, budgets: Sequence[str]) -> Iterator[tuple[str, str, dict[str, float]]]:
    """(plan, method, figures) of weight-only plans that nothing but the weights decided."""
    names = [name for name, module in case.model.named_modules() if layer_kind(module) is not None]
    for rounding in ("nearest", "hqq"):
        for width in ("w4", "w5"):
            start = time.perf_counter()
            result = quantkit.apply(case.model, dict.fromkeys(names, width), rounding=rounding, progress=False)
            yield f"{width}, {result.plan.average_bits:.2f} bits", rounding, _figures(case, result, start)
    for sensitivity in sorted(NO_INPUTS):
        for bits in budgets:
            for rounding in ("nearest", "hqq"):
                start = time.perf_counter()
                result = quantkit.quantize(
                    case.model, f"{bits} bits", sensitivity=sensitivity, rounding=rounding, progress=False
                )
                yield f"{bits} bits, {sensitivity}", rounding, _figures(case, result, start)


def _figures(case: Case, result: quantkit.Result, start: float) -> dict[str, float]:
    seconds = time.perf_counter() - start
    return case.measured(result, runtime=False) | {"seconds": seconds, "MB": float("nan"), "said": float("nan")}


def peak_mb() -> float:
    """The most memory this process has held since ``resident_mb`` was asked to forget it, in MB (Linux)."""
    return _status("VmHWM")


def resident_mb(reset: bool = False) -> float:
    """The memory this process holds, in MB."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1e3


def print_row(model: str, plan: str, method: str, found: Mapping[str, float]) -> None:
    print(
        f"{model:<12} {plan:<25} {method:<10} {found['KL']:8.4f} {found['same']:7.2f} "
        f"{found.get('top1', float('nan')):7.2f} {found.get('runtime', float('nan')):7.2f} "
        f"{found['seconds']:8.0f} {found['MB']:5.0f} {found['said']:5.0f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SOURCES, default=["resnet20"])
    parser.add_argument("--schemes", nargs="*", default=["w2a8", "w3a8", "w4a8", "w4a4"])
    parser.add_argument("--methods", nargs="+", choices=QUANTIZED_BY, default=["nearest", "gptq", "network"])
    parser.add_argument("--budgets", nargs="*", default=[], help="average bits of mixed plans, such as 3 2.5")
    parser.add_argument("--activation", default="a8", help="of the mixed plans (default a8)")
    parser.add_argument("--draws", type=int, default=1, help="seeds to take the mean over (default 1)")
    parser.add_argument("--share", type=float, default=1.0, help="of the calibration images, drawn (default all)")
    parser.add_argument("--unseen", type=int, help="only so many of the evaluation images")
    parser.add_argument("--onnx", action="store_true", help="also export, and measure in onnxruntime")
    parser.add_argument("--no-data", action="store_true", help="weights alone, decided and rounded without any input")
    options = parser.parse_args()
    data = Path(os.environ.get("QUANTKIT_DATA", REPOSITORY.parent / "shared" / "data"))
    print(f"{'model':<12} {'plan':<25} {'method':<10}       KL    same    top1 runtime  seconds    MB  said")
    for name in options.models:
        case = case_of(name, data, options.unseen)
        if options.no_data:
            for row in without_data(case, options.budgets or ["4.5"]):
                print_row(name, *row)
            continue
        plans: dict[str, quantkit.Plan | Mapping[str, str]] = {s: uniform(case, s) for s in options.schemes}
        if options.budgets:
            plans |= mixed_plans(case, options.budgets, options.activation)
        for title, plan in plans.items():
            for method in options.methods:
                print_row(name, title, method, run(case, plan, method, options))


if __name__ == "__main__":
    main()
