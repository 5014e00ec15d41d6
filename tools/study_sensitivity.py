"""How well does a profile predict? Random plans, quantized and measured on images the profile never saw.

    python tools/study_sensitivity.py [--models resnet20 resnet8 mobilenetv1] [--rounding gptq nearest] [--plans 60]

Weights are rounded on the calibration images (training images, without labels). For single layers, and for seeded
random plans in bands of bits, it prints how the predicted damage agrees with the KL divergence measured on evaluation
images: Spearman's and Kendall's rank correlation and the median relative error, of

* the sum of single-layer KL on the plain calibration images, what most tools add up, and
* the Gram prediction (pair terms included) on pair-mixed calibration images, what quantkit profiles by default,

and both crossed, to show which part of the gain comes from the inputs and which from the pair terms.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from safetensors.torch import load_file
from scipy.stats import kendalltau, spearmanr

from quantkit.formats import Scheme
from quantkit.graph.batches import Batch, split_batches
from quantkit.progress import track
from quantkit.sensitivity.gram import gram
from quantkit.sensitivity.inputs import mixed_pairs
from quantkit.sensitivity.measure import KLDamage, Perturbation, Scores, Subject
from quantkit.sensitivity.perturbations import weight_perturbations
from quantkit.targets import Target
from quantkit.transforms.prepare import Prepared, prepare

REPOSITORY = Path(__file__).resolve().parent.parent
BANDS = {"2-3": (2, 3), "2-4": (2, 3, 4), "3-6": (3, 4, 5, 6), "3-8": (3, 4, 5, 6, 8)}
CIFAR = ("cifar10_calib.npz", "images", "cifar10_test_a.npz", "images")
# model -> (weights, file and array of the calibration images, file and array of the evaluation images)
SOURCES = {
    "resnet20": ("resnet20.safetensors", *CIFAR),
    "resnet8": ("resnet8_mlperf.safetensors", *CIFAR),
    "mobilenetv1": ("mobilenetv1_025_vww.safetensors", "vww_images.npz", "calib", "vww_images.npz", "eval"),
}
Plan = dict[str, str]


@dataclass(frozen=True)
class Case:
    """A network ready to be perturbed, its calibration batches, and the evaluation images it is judged on."""

    ready: Prepared
    batches: list[Batch]
    unseen: Subject
    changes: list[Perturbation]

    def measured(self, plans: Sequence[Plan], title: str) -> list[float]:
        """Mean KL to the float model of each plan on the unseen images."""
        chosen = {(p.owner, p.format): p for p in self.changes}
        reference = list(self.unseen.outputs())
        found = []
        for plan in track(plans, title):
            outputs = self.unseen.outputs([chosen[entry] for entry in plan.items()])
            rows = [KLDamage().rows(a, b) for a, b in zip(reference, outputs, strict=True)]
            found.append(float(torch.cat(rows).mean()))
        return found


def recipe_model(name: str) -> ModuleType:
    """The module ``recipes/models/<name>.py``."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "recipes" / "models" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def case_of(name: str, rounding: str, data: Path, bits: Sequence[int]) -> Case:
    """Load a model with its images, and round every layer at so many bits."""
    weights, calibration_file, calibration_array, evaluation_file, evaluation_array = SOURCES[name]
    recipe = recipe_model(name)
    model = recipe.build()
    model.load_state_dict(load_file(data / weights))
    calibration = recipe.preprocess(np.load(data / calibration_file)[calibration_array])
    evaluation = recipe.preprocess(np.load(data / evaluation_file)[evaluation_array])
    batches = split_batches([((calibration,), {})], 128)
    ready = prepare(model, batches, Target.load("onnxruntime-cpu"))
    candidates = {layer: [Scheme.parse(f"w{b}") for b in bits] for layer in ready.quantizable}
    changes, _ = weight_perturbations(ready, candidates, batches, rounding, progress=True)
    return Case(ready, batches, Subject(ready.model, split_batches([((evaluation,), {})], 256), {}), changes)


def random_plans(layers: Sequence[str], bits: Sequence[int], count: int, seed: int) -> list[Plan]:
    """Seeded plans layer -> weight format, each layer's bits drawn alone."""
    draw = random.Random(seed)
    return [{name: f"w{draw.choice(bits)}" for name in layers} for _ in range(count)]


def predictions(scores: Scores, changes: Sequence[Perturbation], plans: Sequence[Plan], pairs: bool) -> list[float]:
    """Damage of each plan as predicted: the sum of damages alone, or half the sum of the Gram matrix."""
    entries = {(p.owner, p.format): k for k, p in enumerate(changes)}
    chosen = [[entries[entry] for entry in plan.items()] for plan in plans]
    if pairs:
        return [0.5 * float(scores.gram[np.ix_(k, k)].sum()) for k in chosen]
    return [float(scores.damage[k].sum()) for k in chosen]


def study(case: Case, bands: Sequence[str], plans: int, seed: int) -> None:
    """Print a table: a row per band, three figures per way of predicting."""
    mixed = mixed_pairs(case.batches, torch.Generator().manual_seed(seed))
    subjects = {"plain": Subject(case.ready.model, case.batches, {}), "mixed": Subject(case.ready.model, mixed, {})}
    scores = {
        name: gram(subject, case.changes, True, torch.Generator().manual_seed(seed))
        for name, subject in subjects.items()
    }
    for name, found in scores.items():
        notes = found.notes
        print(f"{name} inputs: temperature {notes['temperature']:g}, reliability {notes['reliability']:.2f}")
    ways = [(inputs, pairs) for inputs in ("plain", "mixed") for pairs in (False, True)]
    print("Spearman, Kendall, median relative error")
    print(f"{'':6}" + "".join(f" {('Gram' if pairs else 'sum of KL') + ', ' + inputs:>22}" for inputs, pairs in ways))
    singles = [{p.owner: p.format} for p in case.changes if p.format in ("w2", "w3", "w4", "w8")]
    layers = case.ready.quantizable
    sets = {"single": singles} | {b: random_plans(layers, BANDS[b], plans, seed + k) for k, b in enumerate(bands)}
    for title, chosen in sets.items():
        truth = case.measured(chosen, title)
        predicted = [predictions(scores[inputs], case.changes, chosen, pairs) for inputs, pairs in ways]
        print(f"{title:6}" + "".join(f" {agreement(one, truth):>22}" for one in predicted), flush=True)


def agreement(predicted: Sequence[float], truth: Sequence[float]) -> str:
    """Spearman, Kendall and median relative error as text."""
    error = np.median(np.abs(np.array(predicted) - truth) / truth)
    return f"{spearmanr(predicted, truth).statistic:.3f} {kendalltau(predicted, truth).statistic:.3f} {error:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SOURCES, default=["resnet20"])
    parser.add_argument("--rounding", nargs="+", choices=("gptq", "nearest"), default=["gptq"])
    parser.add_argument("--bands", nargs="+", choices=BANDS, default=["2-4", "3-8"])
    parser.add_argument("--plans", type=int, default=60, help="random plans per band (default 60)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    data = Path(os.environ.get("QUANTKIT_DATA", REPOSITORY.parent / "shared" / "data"))
    for name in options.models:
        for rounding in options.rounding:
            case = case_of(name, rounding, data, sorted({b for band in BANDS.values() for b in band}))
            unseen = sum(len(args[0]) for args, _ in case.unseen.batches)
            print(f"\n{name}, {rounding}, {options.plans} random plans a band, KL on {unseen} unseen images")
            study(case, options.bands, options.plans, options.seed)


if __name__ == "__main__":
    main()
