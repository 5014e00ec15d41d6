"""The first stage: what each format of each layer and site costs, alone and in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantkit.errors import CorruptFile
from quantkit.plan import Profile, digest_of
from quantkit.program.inputs import Batch, batch_size
from quantkit.progress import notice, warn
from quantkit.ranges.statistics import rows_seen
from quantkit.sensitivity import ESTIMATORS
from quantkit.sensitivity.inputs import mixed_pairs
from quantkit.sensitivity.measure import Perturbation, Subject
from quantkit.sensitivity.perturbations import site_perturbations, weight_perturbations
from quantkit.sensitivity.rarely_reached import reached_by_few, with_fallback
from quantkit.simulation.model import as_float
from quantkit.stages.forecast import forecast
from quantkit.stages.request import DEFAULT_TARGET, Request, Schemes, TargetName, make_ready
from quantkit.store import Artefacts, require_writable
from quantkit.targets.rules import Rules


def profile(
    model: nn.Module,
    calibration: Any = None,
    *,
    example_inputs: Any = None,
    schemes: Schemes | None = None,
    samples: int | None = None,
    loss: str = "auto",
    target: TargetName = DEFAULT_TARGET,
    rules: Rules | None = None,
    first_last: str = "same",
    sensitivity: str = "auto",
    rounding: str = "auto",
    ranges: str = "mse",
    seed: int = 0,
    progress: bool = True,
    workdir: str | Path | None = None,
) -> Profile:
    """Measure what each format of each layer and site costs, alone and in pairs.

    ``calibration``: any iterable of model inputs (tensor, tuple or dict items), labels not needed; ``samples`` caps
    it. Without it only weights are quantized, by the error of the weights; ``example_inputs``, one batch of inputs,
    then lets the model be traced, which folds BatchNorm and counts operations. ``schemes``: candidate schemes, default
    the target's. ``rules``: ordered (pattern, scheme or schemes), a later one wins. ``first_last``: "8 bits" gives
    layers that no layer stands before, or behind, 8 bits for weights and inputs, unless a rule matches them; with
    "same" they are as all others; either way the plan says so. ``loss``: "kl", "mse" or "auto".
    With ``workdir`` the profile is kept there under a key of everything it depends on and reused when nothing
    changed; until it is complete, every finished layer is, so that a run that was killed resumes. Raises
    InvalidRequest before any measuring when the request cannot be carried out.
    """
    if workdir is not None:
        require_writable(workdir)
    request = make_ready(
        model, calibration, example_inputs=example_inputs, schemes=schemes, samples=samples, loss=loss,
        target=target, rules=rules, first_last=first_last, sensitivity=sensitivity, rounding=rounding, ranges=ranges,
        seed=seed,
    )  # fmt: skip
    return measure(request, progress, workdir)


def measure(
    request: Request, progress: bool, workdir: str | Path | None, evaluator: Evaluator | None = None
) -> Profile:
    """The profile of a request: the one kept in ``workdir``, or a new one, which is kept there. ``evaluator`` is
    passed where there is one already.
    """
    kept = None if workdir is None else Path(workdir) / f"profile-{digest_of(request.settings)}.safetensors"
    artefacts = artefacts_of(request, workdir)
    if kept is not None and kept.exists():
        try:
            found = Profile.load(kept)
        except CorruptFile as error:
            warn(f"measuring again: {error}")
        else:
            notice(f"reusing the profile {kept}")
            artefacts.remove()
            return request.with_latency(found)
    if request.batches:
        expected = forecast(request)
        notice(str(expected))
        notice(f"damage: {expected.rule}")
    measured = _measure(request, progress, evaluator or evaluator_of(request, progress, workdir))
    if kept is not None:
        measured.save(kept)
        artefacts.remove()
    return measured


def artefacts_of(request: Request, workdir: str | Path | None) -> Artefacts:
    """Where a run keeps each finished layer until its profile is complete, keyed by all that decides the figures."""
    if workdir is None:
        return Artefacts()
    return Artefacts(Path(workdir) / f"layers-{digest_of(request.settings | {'torch': torch.__version__})}")


@dataclass(frozen=True)
class Evaluator:
    """What a request is measured on: its model with inputs drawn from the calibration ``batches``, and every format,
    rounded; ``notes`` say how.
    """

    subject: Subject
    perturbations: list[Perturbation]
    notes: dict[str, Any]
    batches: Sequence[Batch]


def evaluator_of(request: Request, progress: bool, workdir: str | Path | None = None) -> Evaluator:
    """Round every candidate format, find every range, and draw the inputs to measure on; what an earlier run left in
    ``workdir`` is not done again.
    """
    ready, batches, settings = request.ready, request.batches, request.settings
    artefacts = artefacts_of(request, workdir)
    perturbations, rounded = weight_perturbations(
        ready, request.candidates, batches, settings["rounding"], progress, artefacts
    )
    perturbations += site_perturbations(ready, request.site_formats, batches, settings["ranges"], progress, artefacts)
    inputs = mixed_pairs(batches, torch.Generator().manual_seed(settings["seed"]))
    if batches:
        notice(f"measuring on {'pair-mixed calibration inputs' if inputs else 'the calibration inputs as they are'}")
    sites = {site.name: site for site in ready.sites}
    subject = Subject(ready.model, inputs or batches, sites, settings["loss"], artefacts=artefacts)
    samples = sum(batch_size(b) for b in batches)
    notes = {
        "inputs": ("pair-mixed" if inputs else "plain") if batches else "none",
        "samples": samples,
        "rounded": rounded,
    }
    return Evaluator(subject, perturbations, notes, batches)


def _measure(request: Request, progress: bool, evaluator: Evaluator) -> Profile:
    subject, changes = evaluator.subject, evaluator.perturbations
    generator = torch.Generator().manual_seed(request.settings["seed"])
    scores = ESTIMATORS[request.settings["sensitivity"]](subject, changes, progress, generator)
    ready = request.ready
    if request.batches:
        rows = rows_seen(as_float(ready.model), ready.trace, ready.quantizable, subject.batches)
        scores = with_fallback(scores, changes, ready.model, reached_by_few(rows, evaluator.notes["samples"]))
    rule = {} if subject.rule is None else {"outputs": subject.rule.record()}
    notes = evaluator.notes | rule | dict(scores.notes)
    return request.profile([(p.owner, p.format) for p in changes], scores, notes)
