"""How well does a profile predict? Every estimator against plans measured on images that it never saw.

    python tools/study_sensitivity.py [--models resnet20 resnet8 mobilenetv1] [--rounding gptq nearest] [--keep FOLDER]

Weights are rounded on the calibration images (training images, without labels). For single layers at 2, 3, 4 and 8
bits, and for seeded random plans in bands of bits, it prints how the predicted damage agrees with the KL divergence
measured on evaluation images: Spearman's and Kendall's rank correlation and the median relative error, of every
estimator that gives damages (``tools/predictors.py`` says on what), and what each costs. With ``--keep`` finished
measurements stay in a folder, so that a run that was killed resumes and several runs share one table.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from golden_run import recipe_model
from predictors import BASES, DEFAULT, Predictor, predictors
from safetensors.torch import load_file
from scipy.stats import kendalltau, spearmanr

from quantkit.formats import Scheme
from quantkit.program.inputs import Batch, split_batches
from quantkit.progress import track
from quantkit.rounding.request import RoundingOptions
from quantkit.sensitivity.by_place import digest_changes
from quantkit.sensitivity.damage import KLDamage
from quantkit.sensitivity.measure import Perturbation, Subject
from quantkit.sensitivity.perturbations import weight_perturbations
from quantkit.store import Artefacts
from quantkit.targets import Target
from quantkit.transforms.prepare import Prepared, prepare

REPOSITORY = Path(__file__).resolve().parent.parent
BANDS = {"2-3": (2, 3), "2-4": (2, 3, 4), "3-6": (3, 4, 5, 6), "3-8": (3, 4, 5, 6, 8)}
SINGLE = "single"
SINGLES = ("w2", "w3", "w4", "w8")
CIFAR = ("cifar10_calib.npz", "images", "cifar10_test_a.npz", "images")
# model -> (weights, file and array of the calibration images, file and array of the evaluation images)
SOURCES = {
    "resnet20": ("resnet20.safetensors", *CIFAR),
    "resnet8": ("resnet8_mlperf.safetensors", *CIFAR),
    "mobilenetv1": ("mobilenetv1_025_vww.safetensors", "vww_images.npz", "calib", "vww_images.npz", "eval"),
}
COMPARED = ("sum of KL", "sum of KL, plain", "HAWQ-V2", "Fisher")
MARGIN = 0.01
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
            rows = [KLDamage().rows(a, b) for (a,), (b,) in zip(reference, outputs, strict=True)]
            found.append(float(torch.cat(rows).mean()))
        return found


def case_of(
    name: str,
    rounding: str,
    data: Path,
    bits: Sequence[int],
    samples: int | None = None,
    images: int | None = None,
    artefacts: Artefacts | None = None,
) -> Case:
    """Load a model with its images (at most so many calibration ``samples`` and evaluation ``images``), and round
    every layer at so many bits.
    """
    weights, calibration_file, calibration_array, evaluation_file, evaluation_array = SOURCES[name]
    recipe = recipe_model(name)
    model = recipe.build()
    model.load_state_dict(load_file(data / weights))
    calibration = recipe.preprocess(np.load(data / calibration_file)[calibration_array])[:samples]
    evaluation = recipe.preprocess(np.load(data / evaluation_file)[evaluation_array])[:images]
    batches = split_batches([((calibration,), {})], 128)
    ready = prepare(model, batches, Target.load("onnxruntime-cpu"))
    candidates = {layer: [Scheme.parse(f"w{b}") for b in bits] for layer in ready.quantizable}
    changes, _ = weight_perturbations(
        ready, candidates, batches, RoundingOptions(rounding), progress=True, artefacts=artefacts
    )
    return Case(ready, batches, Subject(ready.model, quick_batches(evaluation), {}, weights=ready.weights), changes)


def quick_batches(x: torch.Tensor) -> list[Batch]:
    """Small batches with channels last: on a CPU the fastest way through small convolutions."""
    return split_batches([((x.contiguous(memory_format=torch.channels_last),), {})], 32)


def random_plans(layers: Sequence[str], bits: Sequence[int], count: int, seed: int) -> list[Plan]:
    """Seeded plans layer -> weight format, each layer's bits drawn alone."""
    draw = random.Random(seed)
    return [{name: f"w{draw.choice(bits)}" for name in layers} for _ in range(count)]


@dataclass(frozen=True)
class Agreement:
    """Of predictions with measurements: rank correlations, and the median relative error."""

    spearman: float
    kendall: float
    error: float

    @classmethod
    def of(cls, predicted: Sequence[float], truth: Sequence[float]) -> Agreement:
        error = float(np.median(np.abs(np.array(predicted) - truth) / truth))
        return cls(float(spearmanr(predicted, truth).statistic), float(kendalltau(predicted, truth).statistic), error)

    def __str__(self) -> str:
        return f"{self.spearman:.3f} {self.kendall:.2f} ({min(self.error, 99.0):.2f})"


def plan_sets(case: Case, count: int, seed: int) -> dict[str, list[Plan]]:
    """Single layers, and random plans of every band."""
    singles = [{p.owner: p.format} for p in case.changes if p.format in SINGLES]
    layers = case.ready.quantizable
    return {SINGLE: singles} | {b: random_plans(layers, BANDS[b], count, seed + k) for k, b in enumerate(BANDS)}


def truths_of(case: Case, sets: Mapping[str, list[Plan]], artefacts: Artefacts) -> dict[str, list[float]]:
    """Measured KL of every plan on the unseen images, unless it is kept already."""
    found = {}
    for title, plans in sets.items():
        key = [len(case.unseen.batches), digest_changes(case.changes), plans]
        kept = artefacts.find(f"truth {title}", key)
        found[title] = case.measured(plans, title) if kept is None else kept[0]["damage"].tolist()
        if kept is None:
            artefacts.keep(f"truth {title}", key, {"damage": np.array(found[title])})
    return found


def table(
    ways: Sequence[Predictor], sets: Mapping[str, list[Plan]], truths: Mapping[str, list[float]]
) -> dict[str, dict[str, Agreement]]:
    """Print a row per predictor; returns their agreement in every set that they predict."""
    print(f"| Spearman, Kendall (error) | {' | '.join(sets)} | samples | forwards |\n|{'---|' * (len(sets) + 3)}")
    found: dict[str, dict[str, Agreement]] = {}
    for way in ways:
        covered = [title for title in sets if way.covers(title)]
        found[way.name] = {t: Agreement.of([way.predict(t, p) for p in sets[t]], truths[t]) for t in covered}
        cells = [str(found[way.name].get(title, "")) for title in sets]
        print(f"| {way.name} | {' | '.join(cells)} | {way.samples} | {way.forwards:.0f} |", flush=True)
    return found


def summary(cells: Mapping[tuple[str, str], Mapping[str, Mapping[str, Agreement]]]) -> None:
    """Print where the default ranks worse than others, the means, and the default's largest error; nothing where it
    was not asked for.
    """
    cells = {case: found for case, found in cells.items() if DEFAULT in found}
    if not cells:
        return
    for other in [name for name in COMPARED if all(name in found for found in cells.values())]:
        pairs = {
            (*case, title): (found[DEFAULT][title].spearman, found[other][title].spearman)
            for case, found in cells.items()
            for title in found[other]
        }
        worse = [f"{' '.join(key)} ({a:.3f}, {b:.3f})" for key, (a, b) in pairs.items() if a < b - MARGIN]
        means = np.mean(list(pairs.values()), axis=0)
        print(
            f"{other}: mean Spearman {means[1]:.3f}, the default's {means[0]:.3f} over {len(pairs)} cells; lower by "
            f"more than {MARGIN} in: {', '.join(worse) or 'none'}"
        )
    errors = {(*case, t): one.error for case, found in cells.items() for t, one in found[DEFAULT].items()}
    worst = max(errors, key=errors.__getitem__)
    print(f"largest median relative error of the default: {errors[worst]:.2f} ({' '.join(worst)})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--rounding", nargs="+", choices=("gptq", "nearest"), default=["gptq", "nearest"])
    parser.add_argument("--estimators", nargs="+", metavar="NAME", default=(), help="only these rows of the table")
    parser.add_argument("--plans", type=int, default=100, help="random plans per band (default 100)")
    parser.add_argument("--samples", type=int, default=1024, help="calibration images at most (default 1024)")
    parser.add_argument("--images", type=int, default=3000, help="evaluation images at most (default 3000)")
    parser.add_argument("--keep", type=Path, help="folder for finished measurements")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # several runs side by side beat threads inside one
    data = Path(os.environ.get("QUANTKIT_DATA", REPOSITORY.parent / "shared" / "data"))
    bits = sorted({b for band in BANDS.values() for b in band})
    cells = {}
    for name in options.models:
        for rounding in options.rounding:
            kept = Artefacts(options.keep and options.keep / f"{name}-{rounding}-{options.samples}")
            case = case_of(name, rounding, data, bits, options.samples, options.images, kept)
            sets = plan_sets(case, options.plans, options.seed)
            unseen = sum(len(args[0]) for args, _ in case.unseen.batches)
            print(
                f"\n{name}, {rounding}: {options.plans} random plans a band, KL on {unseen} unseen images", flush=True
            )
            print(f"base plans: {', '.join(f'{band}: all layers {base}' for band, base in BASES.items())}")
            truths = truths_of(case, sets, kept)
            ways = predictors(case.ready.model, case.batches, case.changes, options.seed, kept, options.estimators)
            cells[name, rounding] = table(ways, sets, truths)
    print()
    summary(cells)


if __name__ == "__main__":
    main()
