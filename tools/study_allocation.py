"""Which plans are better on inputs that did not decide? Every way of choosing bits, at the same bytes.

    python tools/study_allocation.py [--models resnet20] [--rounding gptq nearest] [--bits 2.25 2.5 3 3.5 4]

Weights only, formats of 2, 3, 4, 6 and 8 bits, rounded on the calibration images. For every budget it prints the KL
divergence from the float model, measured on evaluation images, of the plans that these choose:

* uniform: the widest format that fits for every layer;
* greedy, trace (HAWQ-V2), sum of KL: on the plain calibration images, without pair terms;
* profile: the Gram matrix on pair-mixed calibration images, ``effort="fast"``;
* balanced, thorough: the same, improved by measuring around the plan, and how many measurements that took.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from study_sensitivity import REPOSITORY, SOURCES, Case, case_of

from quantkit.allocation.allocate import allocate
from quantkit.budget import Budget
from quantkit.pipeline.operating_point import EFFORTS, refine
from quantkit.pipeline.profile import Bench
from quantkit.plan import Plan, Profile
from quantkit.sensitivity import ESTIMATORS
from quantkit.sensitivity.inputs import mixed_pairs
from quantkit.sensitivity.measure import Scores, Subject

BITS = (2, 3, 4, 6, 8)
# column -> (inputs, estimator, solver)
WAYS = {
    "uniform": ("plain", "kl", "uniform"),
    "greedy": ("plain", "kl", "greedy"),
    "trace": ("plain", "hessian-trace", "auto"),
    "sum of KL": ("plain", "kl", "auto"),
    "profile": ("mixed", "gram", "auto"),
}
IMPROVED = [effort for effort, allowed in EFFORTS.items() if allowed]


@dataclass(frozen=True)
class Study:
    """A network with its profiles, one per (inputs, estimator), and the bench the improving efforts measure on."""

    case: Case
    profiles: Mapping[tuple[str, str], Profile]
    bench: Bench

    def unseen(self, plan: Plan) -> float:
        """KL on the evaluation images."""
        return self.case.measured([{name: str(scheme) for name, scheme in plan.schemes.items()}], "evaluating")[0]

    def row(self, bits: float, seed: int) -> str:
        """One line of the table: KL per way of choosing."""
        budget = Budget(average_bits=bits)
        cells = []
        for inputs, estimator, solver in WAYS.values():
            plan = allocate(self.profiles[inputs, estimator], budget, solver=solver, seed=seed)
            cells.append(f"{self.unseen(plan):.4f}")
        start = self.profiles["mixed", "gram"]
        plan = allocate(start, budget, seed=seed)
        for effort in IMPROVED:
            better = refine(plan, start, budget, self.bench, effort, seed, progress=True)
            cells.append(f"{self.unseen(better):.4f} ({better.provenance['operating_point']['measurements']:.0f})")
        return f"{bits:<5}" + "".join(f" {cell:>12}" for cell in cells)


def profile_of(case: Case, scores: Scores) -> Profile:
    """A profile of the layers' weights alone."""
    entries = tuple((p.owner, p.format) for p in case.changes)
    return Profile(
        layers={name: replace(layer, inputs=()) for name, layer in case.ready.layers.items()},
        sites={},
        schemes=tuple(f"w{bits}" for bits in BITS),
        entries=entries,
        damage=scores.damage,
        gram=np.diag(2 * scores.damage) if scores.gram is None else scores.gram,
        other_bytes=case.ready.other_bytes,
        float_bytes=case.ready.float_bytes,
        target="onnxruntime-cpu",
    )


def study_of(name: str, rounding: str, data: Path, seed: int) -> Study:
    case = case_of(name, rounding, data, BITS)
    mixed = mixed_pairs(case.batches, torch.Generator().manual_seed(seed))
    subjects = {"plain": Subject(case.ready.model, case.batches, {}), "mixed": Subject(case.ready.model, mixed, {})}
    profiles = {}
    for inputs, estimator, _ in WAYS.values():
        if (inputs, estimator) not in profiles:
            generator = torch.Generator().manual_seed(seed)
            scores = ESTIMATORS[estimator](subjects[inputs], case.changes, True, generator)
            profiles[inputs, estimator] = profile_of(case, scores)
    return Study(case, profiles, Bench(subjects["mixed"], case.changes, {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SOURCES, default=["resnet20"])
    parser.add_argument("--rounding", nargs="+", choices=("gptq", "nearest"), default=["gptq", "nearest"])
    parser.add_argument("--bits", nargs="+", type=float, default=[2.25, 2.5, 3, 3.5, 4])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    data = Path(os.environ.get("QUANTKIT_DATA", REPOSITORY.parent / "shared" / "data"))
    for name in options.models:
        for rounding in options.rounding:
            study = study_of(name, rounding, data, options.seed)
            print(f"\n{name}, {rounding} rounding: KL on unseen images at an average of so many bits (measurements)")
            print(f"{'bits':5}" + "".join(f" {title:>12}" for title in [*WAYS, *IMPROVED]))
            for bits in options.bits:
                print(study.row(bits, options.seed), flush=True)


if __name__ == "__main__":
    main()
