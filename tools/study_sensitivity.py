"""How well does a profile predict? Random plans, quantized and measured on images the profile never saw.

    python tools/study_sensitivity.py

ResNet20 on CIFAR-10, weights rounded by GPTQ on the calibration images (training images, without labels). For seeded
random plans in bands of bits it prints the Spearman correlation, with the KL divergence measured on the evaluation
images, of

* the sum of single-layer KL on the plain calibration images, what most tools add up, and
* the Gram prediction (pair terms included) on pair-mixed calibration images, what quantkit profiles by default,

and both crossed, to show which part of the gain comes from the inputs and which from the pair terms.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr

from quantkit.formats import Scheme
from quantkit.graph.batches import split_batches
from quantkit.progress import track
from quantkit.sensitivity.gram import gram
from quantkit.sensitivity.inputs import mixed_pairs
from quantkit.sensitivity.measure import KLDamage, Perturbation, Scores, Subject
from quantkit.sensitivity.perturbations import weight_perturbations
from quantkit.targets import Target
from quantkit.transforms.prepare import prepare

REPOSITORY = Path(__file__).resolve().parent.parent
BANDS = {"2-4": (2, 3, 4), "3-8": (3, 4, 5, 6, 8)}


def recipe_model(name: str) -> ModuleType:
    """The module ``recipes/models/<name>.py``."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "recipes" / "models" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_plans(layers: list[str], bits: tuple[int, ...], count: int, seed: int) -> list[dict[str, str]]:
    """Seeded plans layer -> weight format, each layer's bits drawn alone."""
    draw = random.Random(seed)
    return [{name: f"w{draw.choice(bits)}" for name in layers} for _ in range(count)]


def predictions(scores: Scores, entries: dict[tuple[str, str], int], plan: dict[str, str]) -> tuple[float, float]:
    """(sum of damages alone, half the Gram sum) of a plan."""
    chosen = [entries[entry] for entry in plan.items()]
    return float(scores.damage[chosen].sum()), 0.5 * float(scores.gram[np.ix_(chosen, chosen)].sum())


def measured(subject: Subject, reference: list[torch.Tensor], chosen: list[Perturbation]) -> float:
    """Mean KL to the float model with all chosen formats in place."""
    rows = [KLDamage().rows(a, b) for a, b in zip(reference, subject.outputs(chosen), strict=True)]
    return float(torch.cat(rows).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plans", type=int, default=60, help="random plans per band (default 60)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    data = Path(os.environ.get("QUANTKIT_DATA", REPOSITORY.parent / "shared" / "data"))
    recipe = recipe_model("resnet20")
    model = recipe.build()
    model.load_state_dict(load_file(data / "resnet20.safetensors"))
    calibration = recipe.preprocess(np.load(data / "cifar10_calib.npz")["images"])
    evaluation = recipe.preprocess(np.load(data / "cifar10_test_a.npz")["images"])
    batches = split_batches([((calibration,), {})], 128)
    ready = prepare(model, batches, Target.load("onnxruntime-cpu"))
    bits = sorted({b for band in BANDS.values() for b in band})
    candidates = {name: [Scheme.parse(f"w{b}") for b in bits] for name in ready.quantizable}
    changes, _ = weight_perturbations(ready, candidates, batches, "gptq", True)
    entries = {(p.owner, p.format): k for k, p in enumerate(changes)}
    mixed = mixed_pairs(batches, torch.Generator().manual_seed(options.seed))
    plain = gram(Subject(ready.model, batches, {}), changes)
    mixed_scores = gram(Subject(ready.model, mixed, {}), changes)
    unseen = Subject(ready.model, split_batches([((evaluation,), {})], 256), {})
    reference = list(unseen.outputs())
    print(
        f"ResNet20, GPTQ weights, {options.plans} random plans a band; Spearman with KL on {len(evaluation)} unseen images"
    )
    print("band  sum of KL, plain   Gram, plain   sum of KL, mixed   Gram, mixed")
    for number, (band, choices) in enumerate(BANDS.items()):
        plans = random_plans(ready.quantizable, choices, options.plans, options.seed + number)
        truth = [
            measured(unseen, reference, [changes[entries[e]] for e in plan.items()]) for plan in track(plans, band)
        ]
        columns = [predictions(s, entries, plan) for s in (plain, mixed_scores) for plan in plans]
        half = len(plans)
        series = [[c[i] for c in columns[start : start + half]] for start in (0, half) for i in (0, 1)]
        values = [spearmanr(truth, one).statistic for one in series]
        print(f"{band:<5} {values[0]:16.3f} {values[1]:13.3f} {values[2]:18.3f} {values[3]:13.3f}", flush=True)


if __name__ == "__main__":
    main()
