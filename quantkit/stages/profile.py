"""The first stage: what each format of each layer and site costs, alone and in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quantkit.errors import CorruptFile, InvalidRequest
from quantkit.plan import Profile, digest_of
from quantkit.program.inputs import Batch, batch_size
from quantkit.progress import notice, warn
from quantkit.ranges.statistics import rows_seen
from quantkit.sensitivity import ESTIMATORS, NO_INPUTS
from quantkit.sensitivity.inputs import mixed_pairs
from quantkit.sensitivity.measure import Perturbation, Subject
from quantkit.sensitivity.perturbations import site_perturbations, weight_perturbations
from quantkit.sensitivity.rarely_reached import reached_by_few, with_fallback
from quantkit.stages.forecast import forecast, rounding_options
from quantkit.stages.loss_moments import loss_moments
from quantkit.stages.options import ApplyOptions, Run
from quantkit.stages.request import Request
from quantkit.store import Artefacts


def measure(request: Request, run: Run, evaluator: Evaluator | None = None) -> Profile:
    """The profile of a request: the one kept in the working directory, or a new one, which is kept there.
    ``evaluator`` is passed where there is one already.
    """
    _require_measurable(request)
    kept = None if run.workdir is None else run.workdir / f"profile-{digest_of(request.settings)}.safetensors"
    artefacts = artefacts_of(request, run.workdir)
    if kept is not None and kept.exists():
        try:
            found = Profile.load(kept)
        except CorruptFile as error:
            warn(f"measuring again: {error}")
        else:
            notice(f"reusing the profile {kept}")
            artefacts.remove()
            return replace(found, latency=request.target.latency)
    measured = _measure(request, run.progress, evaluator or announced_evaluator(request, run))
    if kept is not None:
        measured.save(kept)
        artefacts.remove()
    return measured


def announced_evaluator(request: Request, run: Run) -> Evaluator:
    """What a request is measured on, after saying what the profile will take and what it compares."""
    if request.batches:
        expected = forecast(request)
        notice(str(expected))
        notice(f"damage: {expected.rule}")
    return evaluator_of(request, run)


def _require_measurable(request: Request) -> None:
    """Raise InvalidRequest for activations that the estimator cannot weigh, which it would say after all rounding."""
    asked, formats = request.settings["sensitivity"], request.site_formats
    undecided = [fmt for fmt in formats if not fmt.dynamic] or (formats if len(formats) > 1 else [])
    if asked in NO_INPUTS and undecided:
        raise InvalidRequest(
            f"sensitivity={asked!r} goes by the error of weights, which says nothing of activations, and they would "
            f"be {' or '.join(map(str, undecided))}. Use weight-only schemes such as 'w4', or another sensitivity."
        )


def artefacts_of(request: Request, workdir: Path | None) -> Artefacts:
    """Where a run keeps each finished layer until its profile is complete, keyed by all that decides the figures."""
    if workdir is None:
        return Artefacts()
    return Artefacts(workdir / f"layers-{digest_of(request.settings | {'torch': torch.__version__})}")


@dataclass(frozen=True)
class Evaluator:
    """What a request is measured on: its model with inputs drawn from the calibration ``batches``, and every format,
    rounded; ``notes`` say how.
    """

    subject: Subject
    perturbations: list[Perturbation]
    notes: dict[str, Any]
    batches: Sequence[Batch]


def evaluator_of(request: Request, run: Run) -> Evaluator:
    """Round every candidate format, find every range, and draw the inputs to measure on; what an earlier run left in
    the working directory is not done again.
    """
    _require_measurable(request)
    ready, batches, settings = request.ready, request.batches, request.settings
    artefacts, progress = artefacts_of(request, run.workdir), run.progress
    how = ApplyOptions(settings["rounding"], loss=settings["loss"], seed=settings["seed"])
    rounding = replace(rounding_options(request), known=loss_moments(request.session, ready, how, progress))
    perturbations, rounded = weight_perturbations(ready, request.candidates, batches, rounding, progress, artefacts)
    perturbations += site_perturbations(ready, request.site_formats, batches, settings["ranges"], progress, artefacts)
    inputs = mixed_pairs(batches, torch.Generator().manual_seed(settings["seed"]))
    if batches:
        notice(f"measuring on {'pair-mixed calibration inputs' if inputs else 'the calibration inputs as they are'}")
    sites = {site.name: site for site in ready.sites}
    replay = request.session.replay
    program = None if isinstance(replay, str) else replay.program
    subject = Subject(ready.model, inputs or batches, sites, settings["loss"], (), artefacts, ready.weights, program)
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
        rows = rows_seen(ready.float_model(), ready.program, ready.quantizable, subject.batches)
        scores = with_fallback(scores, changes, ready.weights, reached_by_few(rows, evaluator.notes["samples"]))
    rule = {} if subject.rule is None else {"outputs": subject.rule.record()}
    notes = evaluator.notes | rule | dict(scores.notes)
    return request.profile([(p.owner, p.format) for p in changes], scores, notes)
