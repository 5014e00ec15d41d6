"""Two claims of the literature, tried out: plans at equal size, measured on images that chose nothing.

    python tools/study_claims.py [--models resnet20] [--rounding gptq] [--bits 2.25 2.5 ...] [--keep FOLDER]

* HAWQ-V2 (arXiv 1911.03852): plans from the average Hessian trace beat plans from the top eigenvalue.
* "Augmenting Hessians with Inter-Layer Dependencies" (arXiv 2306.04879): terms between layers lower the damage, at the
  float point and measured around a base plan (all layers at 3 bits up to 3.25 on average, at 4 bits above).

Weights only, formats of 2 to 8 bits, every plan the best of its estimator under the budget. ``--keep`` shares finished
measurements with ``study_sensitivity.py``.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from predictors import ALONE, AROUND, AROUND_BASE, DEFAULT, TOP_EIGENVALUE, TRACE, Predictor, predictors
from study_sensitivity import BANDS, REPOSITORY, SOURCES, Case, case_of

from quantkit.allocation.allocate import allocate
from quantkit.budget import Budget
from quantkit.plan import Profile
from quantkit.sensitivity.by_place import digest_changes
from quantkit.store import Artefacts

BITS = (2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 3.75, 4.0, 4.5, 5.0)
NARROW = 3.25  # up to this many bits on average a plan is measured around all layers at 3 bits, else at 4
# claim -> (what is said to be better, than what)
CLAIMS = {
    "average trace beats top eigenvalue": (TRACE, TOP_EIGENVALUE),
    "terms between layers help at the float point": (DEFAULT, ALONE),
    "terms between layers help around a base plan": tuple(AROUND_BASE),
}


def profile_of(case: Case, way: Predictor, bits: float) -> Profile:
    """The profile that a predictor gives, of the formats it knows around the base that the budget is nearest to."""
    base = "" if "" in way.scores else ("w3" if bits <= NARROW else "w4")
    scores = way.scores[base]
    known = [k for k, p in enumerate(case.changes) if not base or p.format in AROUND[base]]
    damage = scores.damage[known]
    matrix = np.diag(2 * damage)
    if way.with_pairs and scores.gram is not None:
        matrix = scores.gram[np.ix_(known, known)]
    # a plan has one entry of every layer: the same added to all of them changes no choice
    shift = max(0.0, -float(np.linalg.eigvalsh(matrix)[0]), -2 * float(damage.min()))
    formats = list(dict.fromkeys(case.changes[k].format for k in known))
    return Profile(
        layers={name: replace(layer, inputs=()) for name, layer in case.ready.layers.items()},
        sites={},
        schemes=tuple(formats),
        entries=tuple((case.changes[k].owner, case.changes[k].format) for k in known),
        damage=damage + shift / 2,
        gram=matrix + shift * np.eye(len(known)),
        other_bytes=case.ready.other_bytes,
        float_bytes=case.ready.float_bytes,
        target="onnxruntime-cpu",
    )


def measured(case: Case, way: Predictor, bits: float, seed: int, artefacts: Artefacts) -> float:
    """KL on the evaluation images of the plan that a predictor chooses."""
    plan = allocate(profile_of(case, way, bits), Budget(average_bits=bits), seed=seed)
    schemes = {name: str(scheme) for name, scheme in plan.schemes.items()}
    key = [len(case.unseen.batches), digest_changes(case.changes), schemes]
    name = f"plan {plan.digest()}"
    kept = artefacts.find(name, key)
    damage = case.measured([schemes], "evaluating")[0] if kept is None else float(kept[0]["damage"])
    artefacts.keep(name, key, {"damage": np.array(damage)})
    return damage


def verdicts(rows: Mapping[float, Mapping[str, float]]) -> None:
    """Print for every claim at how many budgets it holds, and the mean damages."""
    for claim, (better, worse) in CLAIMS.items():
        pairs = np.array([(row[better], row[worse]) for row in rows.values()])
        wins, ties = int((pairs[:, 0] < pairs[:, 1]).sum()), int((pairs[:, 0] == pairs[:, 1]).sum())
        means, ratio = pairs.mean(0), float(np.exp(np.log(pairs[:, 0] / pairs[:, 1]).mean()))
        print(
            f"{claim}: at {wins} of {len(pairs)} budgets ({ties} equal); mean KL {means[0]:.4f} to {means[1]:.4f}, "
            f"geometric mean of the ratios {ratio:.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SOURCES, default=["resnet20"])
    parser.add_argument("--rounding", nargs="+", choices=("gptq", "nearest"), default=["gptq"])
    parser.add_argument("--bits", nargs="+", type=float, default=BITS)
    parser.add_argument("--samples", type=int, default=512, help="calibration images at most (default 512)")
    parser.add_argument("--images", type=int, default=512, help="evaluation images at most (default 512)")
    parser.add_argument("--keep", type=Path, help="folder for finished measurements")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = Path(os.environ.get("QUANTKIT_DATA", REPOSITORY.parent / "shared" / "data"))
    names = list(dict.fromkeys(name for pair in CLAIMS.values() for name in pair))
    bits = sorted({b for band in BANDS.values() for b in band})
    for model in options.models:
        for rounding in options.rounding:
            kept = Artefacts(options.keep and options.keep / f"{model}-{rounding}-{options.samples}")
            case = case_of(model, rounding, data, bits, options.samples, options.images, kept)
            ways = {
                w.name: w for w in predictors(case.ready.model, case.batches, case.changes, options.seed, kept, names)
            }
            print(
                f"\n{model}, {rounding}: KL on unseen images\n| bits | {' | '.join(names)} |\n"
                f"|{'---|' * (len(names) + 1)}"
            )
            rows = {}
            for average in options.bits:
                rows[average] = {n: measured(case, ways[n], average, options.seed, kept) for n in names}
                print(f"| {average} | {' | '.join(f'{v:.4f}' for v in rows[average].values())} |", flush=True)
            verdicts(rows)


if __name__ == "__main__":
    main()
