"""The first stage: what each format of each layer and site costs, alone and in pairs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantkit.errors import CorruptFile
from quantkit.graph.batches import batch_size
from quantkit.pipeline.request import DEFAULT_TARGET, Request, Schemes, make_ready
from quantkit.plan import Profile, digest_of
from quantkit.progress import notice, warn
from quantkit.sensitivity import ESTIMATORS
from quantkit.sensitivity.inputs import mixed_pairs
from quantkit.sensitivity.measure import Perturbation, Subject
from quantkit.sensitivity.perturbations import site_perturbations, weight_perturbations
from quantkit.store import require_writable
from quantkit.targets import Target
from quantkit.targets.rules import Rules


def profile(
    model: nn.Module,
    calibration: Any,
    *,
    schemes: Schemes | None = None,
    samples: int | None = None,
    loss: str = "auto",
    target: str | Target = DEFAULT_TARGET,
    rules: Rules | None = None,
    sensitivity: str = "gram",
    rounding: str = "auto",
    ranges: str = "mse",
    seed: int = 0,
    progress: bool = True,
    workdir: str | Path | None = None,
) -> Profile:
    """Measure what each format of each layer and site costs, alone and in pairs.

    ``calibration``: any iterable of model inputs (tensor, tuple or dict items), labels not needed; ``samples`` caps
    it. ``schemes``: candidate schemes, default the target's. ``rules``: ordered (pattern, scheme or schemes), a later
    one wins. ``loss``: "kl", "mse" or "auto". With ``workdir`` the profile is kept there under a key of everything it
    depends on and reused when nothing changed. Raises InvalidRequest before any measuring when the request cannot be
    carried out.
    """
    if workdir is not None:
        require_writable(workdir)
    request = make_ready(
        model, calibration, schemes=schemes, samples=samples, loss=loss, target=target, rules=rules,
        sensitivity=sensitivity, rounding=rounding, ranges=ranges, seed=seed,
    )  # fmt: skip
    return measure(request, progress, workdir)


def measure(request: Request, progress: bool, workdir: str | Path | None, bench: Bench | None = None) -> Profile:
    """The profile of a request: the one kept in ``workdir``, or a new one, which is kept there. ``bench``: where it
    is at hand already.
    """
    kept = None if workdir is None else Path(workdir) / f"profile-{digest_of(request.settings)}.safetensors"
    if kept is not None and kept.exists():
        try:
            found = Profile.load(kept)
        except CorruptFile as error:
            warn(f"measuring again: {error}")
        else:
            notice(f"reusing the profile {kept}")
            return found
    measured = _measure(request, progress, bench)
    if kept is not None:
        measured.save(kept)
    return measured


@dataclass(frozen=True)
class Bench:
    """What a request is measured on: its model with its inputs, and every format, rounded; ``notes`` say how."""

    subject: Subject
    perturbations: list[Perturbation]
    notes: dict[str, Any]


def bench_of(request: Request, progress: bool) -> Bench:
    """Round every candidate format, find every range, and draw the inputs to measure on."""
    ready, batches, settings = request.ready, request.batches, request.settings
    perturbations, rounded = weight_perturbations(ready, request.candidates, batches, settings["rounding"], progress)
    perturbations += site_perturbations(ready, request.site_formats, batches, settings["ranges"], progress)
    inputs = mixed_pairs(batches, torch.Generator().manual_seed(settings["seed"]))
    notice(f"measuring on {'pair-mixed calibration inputs' if inputs else 'the calibration inputs as they are'}")
    subject = Subject(ready.model, inputs or batches, {s.name: s for s in ready.sites}, settings["loss"])
    samples = sum(batch_size(b) for b in batches)
    notes = {"inputs": "pair-mixed" if inputs else "plain", "samples": samples, "rounded": rounded}
    return Bench(subject, perturbations, notes)


def _measure(request: Request, progress: bool, bench: Bench | None = None) -> Profile:
    bench = bench or bench_of(request, progress)
    generator = torch.Generator().manual_seed(request.settings["seed"])
    scores = ESTIMATORS[request.settings["sensitivity"]](bench.subject, bench.perturbations, progress, generator)
    entries = [(p.owner, p.format) for p in bench.perturbations]
    return request.profile(entries, scores, bench.notes | dict(scores.notes))
