"""Which plans are better on inputs that did not decide? Every way of choosing bits, at the same bytes.

    python tools/study_allocation.py [--models resnet20] [--rounding gptq nearest] [--bits 2.25 2.5 3 3.5 4]

Weights only, formats of 2, 3, 4, 6 and 8 bits, rounded on the calibration images. For every budget it prints the KL
divergence from the float model, measured on evaluation images, of the plans that these choose:

* uniform: the widest format that fits for every layer; LIM, ZD: layers by rank (LayerwiseQuant);
* greedy, trace (HAWQ-V2), sum of KL: on the plain calibration images, without pair terms;
* profile: the Gram matrix on pair-mixed calibration images, ``effort="fast"``;
* balanced, thorough: the same, improved by measuring around the plan, and how many measurements that took.

``long_search.py`` says how good a plan can get.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from study_sensitivity import REPOSITORY, SOURCES, Case, case_of

from quantkit.allocation.allocate import allocate
from quantkit.budget import Budget
from quantkit.plan import Plan, Profile
from quantkit.sensitivity import ESTIMATORS
from quantkit.sensitivity.inputs import mixed_pairs
from quantkit.sensitivity.measure import Perturbation, Scores, Subject
from quantkit.stages.operating_point import EFFORTS, refine
from quantkit.stages.profile import Evaluator

BITS = (2, 3, 4, 6, 8)
# way of choosing -> (inputs, estimator, solver)
WAYS = {
    "uniform": ("plain", "kl", "uniform"),
    "greedy": ("plain", "kl", "greedy"),
    "LIM": ("plain", "lim-layer", "by-rank"),
    "ZD": ("plain", "zd-layer", "by-rank"),
    "trace": ("plain", "hessian-trace", "auto"),
    "sum of KL": ("plain", "kl", "auto"),
    "profile": ("mixed", "gram", "auto"),
}
DEFAULT = WAYS["profile"][:2]
IMPROVED = [effort for effort, allowed in EFFORTS.items() if allowed]


@dataclass(frozen=True)
class Study:
    """A network with its profiles, one per (inputs, estimator), the orders of the estimators that only rank, and the
    evaluator the improving efforts measure on.
    """

    case: Case
    profiles: Mapping[tuple[str, str], Profile]
    orders: Mapping[tuple[str, str], tuple[str, ...]]
    evaluator: Evaluator

    @property
    def profile(self) -> Profile:
        """What quantkit measures by default."""
        return self.profiles[DEFAULT]

    def plan(self, way: str, bits: float, seed: int) -> Plan:
        """The plan that a way of choosing finds."""
        inputs, estimator, solver = WAYS[way]
        order = self.orders.get((inputs, estimator), ())
        profile = self.profiles.get((inputs, estimator), self.profile)
        return allocate(profile, Budget(average_bits=bits), solver=solver, order=order, seed=seed)

    def unseen(self, plan: Plan) -> float:
        """KL on the evaluation images."""
        return self.case.measured([{name: str(scheme) for name, scheme in plan.schemes.items()}], "evaluating")[0]


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


def layer_order(perturbations: Sequence[Perturbation], scores: Scores) -> tuple[str, ...]:
    """Layers by their highest score, highest first; what comes first in the model comes first among equals."""
    highest: dict[str, float] = {}
    for p, score in zip(perturbations, scores.damage, strict=True):
        if not p.at_site:
            highest[p.owner] = max(float(score), highest.get(p.owner, float("-inf")))
    return tuple(sorted(highest, key=highest.__getitem__, reverse=True))


def study_of(name: str, rounding: str, data: Path, samples: int, seed: int, ways: Iterable[str]) -> Study:
    """What some ways of choosing, the profile's among them, need to know."""
    case = case_of(name, rounding, data, BITS)
    batches = case.batches[: -(-samples // 128)]
    mixed = mixed_pairs(batches, torch.Generator().manual_seed(seed))
    assert mixed is not None, "images can be mixed"
    weights = case.ready.weights
    subjects = {
        "plain": Subject(case.ready.model, batches, {}, weights=weights),
        "mixed": Subject(case.ready.model, mixed, {}, weights=weights),
    }
    profiles, orders = {}, {}
    for inputs, estimator, _ in dict.fromkeys(WAYS[way] for way in ways):
        generator = torch.Generator().manual_seed(seed)
        scores = ESTIMATORS[estimator](subjects[inputs], case.changes, True, generator)
        if scores.ranking:
            orders[inputs, estimator] = layer_order(case.changes, scores)
        else:
            profiles[inputs, estimator] = profile_of(case, scores)
    return Study(case, profiles, orders, Evaluator(subjects["mixed"], case.changes, {}, batches))


def row(study: Study, bits: float, seed: int) -> str:
    """One line of the table: KL per way of choosing."""
    cells = [f"{study.unseen(study.plan(way, bits, seed)):.4f}" for way in WAYS]
    start = study.plan("profile", bits, seed)
    for effort in IMPROVED:
        better = refine(start, study.profile, Budget(average_bits=bits), study.evaluator, effort, progress=True)
        cells.append(f"{study.unseen(better):.4f} ({better.provenance['operating_point']['measurements']:.0f})")
    return f"{bits:<5}" + "".join(f" {cell:>12}" for cell in cells)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=SOURCES, default=["resnet20"])
    parser.add_argument("--rounding", nargs="+", choices=("gptq", "nearest"), default=["gptq", "nearest"])
    parser.add_argument("--bits", nargs="+", type=float, default=[2.25, 2.5, 3, 3.5, 4])
    parser.add_argument("--samples", type=int, default=1024, help="calibration images to measure on")
    parser.add_argument("--seed", type=int, default=0)


def studies(options: argparse.Namespace, ways: Iterable[str]) -> Iterator[tuple[str, Study]]:
    """(title, study for some ways of choosing) of every model and rounding asked for."""
    data = Path(os.environ.get("QUANTKIT_DATA", REPOSITORY.parent / "shared" / "data"))
    for name in options.models:
        for rounding in options.rounding:
            study = study_of(name, rounding, data, options.samples, options.seed, ways)
            yield f"{name}, {rounding} rounding", study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    options = parser.parse_args()
    for title, study in studies(options, WAYS):
        print(f"\n{title}: KL on unseen images at an average of so many bits (measurements)")
        print(f"{'bits':5}" + "".join(f" {way:>12}" for way in [*WAYS, *IMPROVED]))
        for bits in options.bits:
            print(row(study, bits, options.seed), flush=True)


if __name__ == "__main__":
    main()
