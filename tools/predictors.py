"""What the sensitivity study compares: estimators on inputs drawn from the calibration images, and what they cost.

All but "sum of KL, plain" see the same pair-mixed images as the profile; estimators that cost many forwards see fewer
of them. A cost is processor time, in forwards of the samples that the estimator saw; not a number where a killed run
was resumed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from quantkit.program.inputs import Batch, split_batches
from quantkit.sensitivity import ESTIMATORS, hessian_trace
from quantkit.sensitivity.by_place import digest_changes
from quantkit.sensitivity.inputs import mixed_pairs
from quantkit.sensitivity.measure import Perturbation, Scores, Subject
from quantkit.store import Artefacts

DEFAULT, ALONE, TRACE, TOP_EIGENVALUE = "Gram (default)", "sum of KL", "HAWQ-V2", "HAWQ, top eigenvalue"
BASES = {"2-3": "w3", "2-4": "w3", "3-6": "w4", "3-8": "w4"}
AROUND = {"w3": ("w2", "w3", "w4"), "w4": ("w3", "w4", "w5", "w6", "w8")}
AROUND_SAMPLES = 256
AROUND_BASE = {"Gram around a base plan": True, "sum of KL around a base plan": False}  # name -> with pair terms
PROBES = 16  # for Hessian traces; the estimator's own limit is higher than a study of three networks can afford
MOST_PAIRS = 2000
# name in the table -> (estimator, plain or mixed inputs, samples at most)
PREDICTORS = {
    DEFAULT: ("gram", "mixed", 1 << 30),
    "Fisher": ("fisher", "mixed", 1 << 30),
    TRACE: ("hessian-trace", "mixed", 16),
    TOP_EIGENVALUE: ("hessian-eigenvalue", "mixed", 16),
    "sum of KL, plain": ("kl", "plain", 128),
    "exact pairs (hvp)": ("hvp-pairs", "mixed", 32),
    "noise": ("noise", "mixed", 32),
    "first order": ("first-order", "mixed", 1 << 30),
    "CLADO (pairwise)": ("pairwise", "mixed", 32),
}


@dataclass(frozen=True)
class Predictor:
    """Predicts plans (layer -> format) from scores: those of all sets, or of each base plan."""

    name: str
    entries: Mapping[tuple[str, str], int]
    scores: Mapping[str, Scores]
    samples: int
    forwards: float
    with_pairs: bool = True

    def covers(self, title: str) -> bool:
        return "" in self.scores or title in BASES

    def predict(self, title: str, plan: Mapping[str, str]) -> float:
        scores = self.scores.get("") or self.scores[BASES[title]]
        chosen = [self.entries[entry] for entry in plan.items()]
        damage = scores.predict(chosen) if self.with_pairs else float(scores.damage[chosen].sum())
        return damage + scores.notes.get("base_damage", 0.0)


@dataclass(frozen=True)
class Lab:
    """A model with its inputs: scores by name, timed, and kept where there is a folder."""

    model: nn.Module
    inputs: Mapping[str, Sequence[Batch]]
    changes: Sequence[Perturbation]
    seed: int
    artefacts: Artefacts

    def subject(self, inputs: str, samples: int, base: str) -> Subject:
        x = torch.cat([args[0] for args, _ in self.inputs[inputs]])[:samples]
        x = x.contiguous(memory_format=torch.channels_last)
        fixed = [p for p in self.changes if p.format == base]
        folder = self.artefacts.folder and self.artefacts.folder / f"{inputs}-{samples}-{base or 'float'}"
        return Subject(self.model, split_batches([((x,), {})], 32), {}, base=fixed, artefacts=Artefacts(folder))

    def scores(
        self, estimator: str, inputs: str, samples: int, base: str = "", formats: Sequence[str] = ()
    ) -> tuple[Scores, float]:
        """Scores of the changes (those in ``formats``, where given, nan for others), and forwards they took."""
        chosen = [k for k, p in enumerate(self.changes) if not formats or p.format in formats]
        changes = [self.changes[k] for k in chosen]
        key = [inputs, samples, base, self.seed, digest_changes(changes)]
        kept = self.artefacts.find(_name(estimator, key), key) or self._measured(estimator, key, changes)
        return _spread(kept[0], chosen, len(self.changes)), float(kept[0]["forwards"])

    def _measured(
        self, estimator: str, key: list, changes: Sequence[Perturbation]
    ) -> tuple[dict[str, np.ndarray], str]:
        inputs, samples, base = key[:3]
        subject = self.subject(inputs, samples, base)
        folder = subject.artefacts.folder
        resumed = folder is not None and folder.exists()
        once = min(_seconds(lambda: list(replace(subject, base=()).outputs())) for _ in range(2))
        measured: list[Scores] = []
        generator = torch.Generator().manual_seed(self.seed)
        spent = _seconds(lambda: measured.append(ESTIMATORS[estimator](subject, changes, True, generator)))
        scores = measured[0]
        arrays = {"damage": scores.damage, "bend": np.array([scores.saturation, scores.growth])}
        arrays["forwards"] = np.array(np.nan if resumed else spent / once)
        arrays["base_damage"] = np.array(scores.notes.get("base_damage", 0.0))
        if scores.gram is not None:
            arrays["gram"] = scores.gram
        self.artefacts.keep(_name(estimator, key), key, arrays, repr(dict(scores.notes)))
        print(f"  {estimator} on {samples} {inputs} samples: {scores.notes}", flush=True)
        return arrays, ""


def _name(estimator: str, key: Sequence) -> str:
    return f"scores of {estimator}, {' '.join(map(str, key[:3]))}"


def _seconds(work: Callable[[], object]) -> float:
    """Processor time: what else the machine does is not counted."""
    start = time.process_time()
    work()
    return time.process_time() - start


def _spread(arrays: Mapping[str, np.ndarray], chosen: Sequence[int], count: int) -> Scores:
    damage = np.full(count, np.nan)
    damage[chosen] = arrays["damage"]
    matrix = None
    if "gram" in arrays:
        matrix = np.full((count, count), np.nan)
        matrix[np.ix_(chosen, chosen)] = arrays["gram"]
    notes = {"base_damage": float(arrays["base_damage"])}
    saturation, growth = arrays["bend"].tolist()
    return Scores(damage, np.zeros(count), matrix, notes, saturation=saturation, growth=growth)


def predictors(
    model: nn.Module,
    batches: Sequence[Batch],
    changes: Sequence[Perturbation],
    seed: int,
    artefacts: Artefacts,
    names: Collection[str] = (),
) -> list[Predictor]:
    """All predictors, or those of ``names``, the default first; pairs of all formats only where they are
    few.
    """
    mixed = mixed_pairs(batches, torch.Generator().manual_seed(seed))
    assert mixed is not None, "the study's inputs are images"
    lab = Lab(model, {"plain": batches, "mixed": mixed}, changes, seed, artefacts)
    entries = {(p.owner, p.format): k for k, p in enumerate(changes)}
    available = sum(len(args[0]) for args, _ in batches)
    chosen: list[Predictor] = []
    hessian_trace.MOST_PROBES = PROBES
    for name, (estimator, inputs, most) in PREDICTORS.items():
        too_many = estimator == "pairwise" and len(changes) ** 2 / 2 > MOST_PAIRS
        if too_many or (names and not {name, ALONE if name == DEFAULT else name} & set(names)):
            continue
        samples = min(most, available)
        scores, forwards = lab.scores(estimator, inputs, samples)
        chosen.append(Predictor(name, entries, {"": scores}, samples, forwards))
        if name == DEFAULT:
            chosen.append(Predictor(ALONE, entries, {"": scores}, samples, forwards, with_pairs=False))
    if names and not set(AROUND_BASE) & set(names):
        return chosen
    samples = min(AROUND_SAMPLES, available)
    around = {base: lab.scores("gram", "mixed", samples, base, formats) for base, formats in AROUND.items()}
    scores_around, forwards = {b: s for b, (s, _) in around.items()}, sum(f for _, f in around.values())
    for name, pairs in AROUND_BASE.items():
        chosen.append(Predictor(name, entries, scores_around, samples, forwards, pairs))
    return chosen
