"""How well do the Gram and the Fisher profile order plans of transformers, and what does each take?

    python tools/study_fisher.py [--models llama minilm] [--estimators gram fisher] [--samples 16] [--unseen 16]
        [--plans 100] [--wheels FOLDER] [--keep FOLDER]

The small Llama in {w2, w3, w4, w6} g64 with zero points, embedding and head in {w4, w8}; MiniLM in {w2, w3, w4, w6,
w8} with the 8-bit codes of each site or without. Rounded by GPTQ on calibration text; random plans, a format drawn for
every layer (and site), are measured as a whole on text that decided nothing. Prints Spearman's rank correlation of
predicted with measured damage, the median relative error, forwards as the estimators announce them (a backward counts
as two) and processor time over that of a forward.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from study_uniform import llama, minilm

from quantkit.program.inputs import Batch, split_batches
from quantkit.sensitivity import COSTS, ESTIMATORS
from quantkit.sensitivity.by_place import members_of
from quantkit.sensitivity.damage import Reference
from quantkit.sensitivity.measure import Perturbation, Subject
from quantkit.sensitivity.registry import Workload
from quantkit.stages.options import Run
from quantkit.stages.profile import Evaluator, evaluator_of
from quantkit.stages.request import make_ready
from quantkit.store import Artefacts

REPOSITORY = Path(__file__).resolve().parent.parent
BATCH = 4


def random_plans(changes: Sequence[Perturbation], count: int, seed: int) -> list[list[int]]:
    """A format for every layer; of every site one too, or none."""
    draw, places = random.Random(seed), members_of(changes)
    options = [[*own, *[-1] * len(own)] if place[1] else own for place, own in places.items()]
    return [[k for own in options if (k := draw.choice(own)) >= 0] for _ in range(count)]


def measured(subject: Subject, changes: Sequence[Perturbation], plans: Sequence[Sequence[int]]) -> np.ndarray:
    """The damage of every plan on a subject's inputs."""
    reference = Reference.of(subject)
    return np.array([reference.damage_of(subject.outputs([changes[k] for k in plan])).mean for plan in plans])


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor time, and what the work gave."""
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def study(evaluator: Evaluator, unseen: Sequence[Batch], plans: int, estimators: Sequence[str]) -> None:
    """Print a row for every estimator."""
    changes, subject = evaluator.perturbations, replace(evaluator.subject, artefacts=Artefacts())
    chosen = random_plans(changes, plans, 1)
    truth = measured(replace(subject, batches=unseen), changes, chosen)
    once = min(seconds(lambda: list(subject.float_outputs()))[0] for _ in range(2))
    work = Workload(len(changes), len(members_of(changes)), evaluator.notes["samples"])
    print(f"{len(changes)} formats, {len(chosen)} plans of damage {truth.min():.4g} to {truth.max():.4g}")
    print("| profile | Spearman | relative error | forwards | CPU seconds | over a forward's |")
    print("|---|---|---|---|---|---|")
    for name in estimators:
        draw = torch.Generator().manual_seed(0)
        spent, scores = seconds(lambda name=name, draw=draw: ESTIMATORS[name](subject, changes, False, draw))
        predicted = np.array([scores.predict(plan) for plan in chosen])
        rank, error = float(spearmanr(predicted, truth).statistic), float(np.median(np.abs(predicted / truth - 1)))
        forwards = COSTS[name].forwards(work)
        print(f"| {name} | {rank:.3f} | {error:.2f} | {forwards:.0f} | {spent:.0f} | {spent / once:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=("llama", "minilm"), default=["llama", "minilm"])
    parser.add_argument("--estimators", nargs="+", default=["gram", "fisher"])
    parser.add_argument("--samples", type=int, default=16, help="calibration windows or sentences (default 16)")
    parser.add_argument("--unseen", type=int, default=16, help="evaluation windows or sentences (default 16)")
    parser.add_argument("--plans", type=int, default=100)
    parser.add_argument("--wheels", type=Path, default=REPOSITORY / "out" / "wheels")
    parser.add_argument("--keep", type=Path, help="folder for finished roundings")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    data = Path(os.environ.get("QUANTKIT_DATA", REPOSITORY.parent / "shared" / "data"))
    for name in asked.models:
        if name == "llama":
            model, shown, held, options = llama(data, asked.samples, asked.unseen)
        else:
            model, shown, held, options = minilm(data, asked.wheels, asked.samples, asked.unseen)
            options["schemes"] = [f"w{bits}a8" for bits in (2, 3, 4, 6, 8)]
        print(f"\n{name}: {asked.samples} calibration and {asked.unseen} unseen samples")
        evaluator = evaluator_of(make_ready(model.eval(), shown, **options), Run(False, asked.keep))
        study(evaluator, split_batches(held, BATCH), asked.plans, asked.estimators)


if __name__ == "__main__":
    main()
