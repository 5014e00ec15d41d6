"""A request checked and made ready: everything that can be known, or be wrong, before anything is measured."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Size, nn

from quantkit.errors import InvalidRequest
from quantkit.formats import ActivationFormat, Scheme
from quantkit.plan import FLOAT_STORAGE, LARGEST_OTHERS, Profile, SiteRecord, digest_shapes
from quantkit.program.inputs import Batch
from quantkit.program.operations import operations_of
from quantkit.rounding import require_numbers
from quantkit.sensitivity import require_additive
from quantkit.sensitivity.measure import Scores
from quantkit.session import Session
from quantkit.stages.auto import loss_for
from quantkit.stages.beyond_half import why_not_half, without_beyond_half
from quantkit.stages.estimator import MEASURED, estimator_for
from quantkit.stages.first_last import policy_record, with_policy
from quantkit.stages.inputs import Inputs, tell_what_is_missing
from quantkit.stages.options import FLOAT16, FLOAT32, ProfileOptions, chosen
from quantkit.targets import Target
from quantkit.targets.rules import (
    Rules,
    candidate_schemes,
    decided_by_rule,
    parse_schemes,
    require_kinds,
    require_runnable,
    weights_only,
    why_float,
)
from quantkit.transforms.prepare import Prepared, leave_float, read_in_float, with_sites_of

DEFAULT_TARGET = "onnxruntime-cpu"
TargetName = str | os.PathLike[str] | Target


@dataclass(frozen=True)
class Request:
    """A session with the layers and sites that the candidates of a profile leave to be quantized, and what else
    decides the result; ``by_rule`` are the layers that a rule of the user's names.
    """

    session: Session
    ready: Prepared
    candidates: dict[str, tuple[Scheme, ...]]
    settings: dict[str, Any]
    by_rule: frozenset[str] = frozenset()

    @property
    def inputs(self) -> Inputs:
        return self.session.inputs

    @property
    def target(self) -> Target:
        return self.session.target

    @property
    def batches(self) -> list[Batch]:
        """The calibration data, in batches; none without data."""
        return self.inputs.batches

    @property
    def site_formats(self) -> list[ActivationFormat]:
        """The activation formats that some candidate uses."""
        used = {s.activation for options in self.candidates.values() for s in options if s.activation is not None}
        return sorted(used, key=str)

    def entries(self) -> list[tuple[str, str]]:
        """(owner, format) of everything a profile measures: weight formats layer by layer, then site formats."""
        weights = [
            (name, str(weight))
            for name, options in self.candidates.items()
            for weight in dict.fromkeys(s.weight for s in options if s.weight is not None)
        ]
        return weights + [(site.name, str(fmt)) for site in self.ready.sites for fmt in self.site_formats]

    def profile(self, entries: Sequence[tuple[str, str]], scores: Scores, provenance: Mapping[str, Any]) -> Profile:
        """The profile of this request with these scores; its settings are added to the provenance. Raises
        InvalidRequest for damages that are not finite.
        """
        ready = self.ready
        if bad := [entry for entry, damage in zip(entries, scores.damage, strict=True) if not np.isfinite(damage)]:
            raise InvalidRequest(
                f"The damage of {bad[0][1]} at {bad[0][0]} is not a finite number. Does the model return infinite or "
                "NaN outputs on the calibration inputs?"
            )
        stored = () if any(fmt.dynamic for fmt in self.site_formats) else ready.sites  # codes of tokens are not kept
        return Profile(
            layers=ready.layers,
            sites={s.name: SiteRecord(s.name, Size(s.shape).numel(), s.consumers) for s in ready.sites},
            schemes=tuple(self.settings["schemes"]),
            entries=tuple(entries),
            damage=scores.damage,
            gram=np.diag(2 * scores.damage) if scores.gram is None else scores.gram,
            other_bytes=ready.other_bytes,
            float_bytes=ready.float_bytes,
            float32_bytes=ready.float32_bytes,
            target=self.target.name,
            candidates={name: tuple(str(s) for s in options) for name, options in self.candidates.items()},
            provenance=self.settings | {LARGEST_OTHERS: dict(ready.largest_others)} | dict(provenance),
            saturation=scores.saturation,
            growth=scores.growth,
            operations=operations_of(ready.program, stored, self.target),
            latency=self.target.latency,
        )

    def unmeasured(self) -> Profile:
        """The profile with all damages zero: enough to tell which budgets can be met."""
        entries = self.entries()
        nothing = np.zeros(len(entries))
        return self.profile(entries, Scores(nothing, nothing), {})


def make_ready(
    model: nn.Module,
    calibration: Any,
    *,
    example_inputs: Any = None,
    samples: int | None = None,
    target: TargetName = DEFAULT_TARGET,
    **options: Any,
) -> Request:
    """Check a request, whose ``options`` are fields of ProfileOptions, and prepare the model. Raises InvalidRequest,
    cheapest checks first.
    """
    goal, asked = Target.load(target), ProfileOptions(**options)
    require_additive(asked.sensitivity)
    wanted = parse_schemes(asked.schemes, goal)
    require_runnable(asked.rules, goal)
    inputs = Inputs.of(model, calibration, example_inputs, samples)
    if asked.schemes is None and not inputs.batches:
        wanted = weights_only(wanted)
    asked = replace(asked, sensitivity=inputs.sensitivity(asked.sensitivity), rounding=inputs.rounding(asked.rounding))
    return request_of(Session.open(model, inputs, goal), wanted, asked)


def request_of(session: Session, wanted: Sequence[Scheme], options: ProfileOptions) -> Request:
    """The request for ``wanted`` candidates. Raises InvalidRequest for what the model or the target cannot do."""
    if options.float_storage == FLOAT16:
        session = session.storing_halves()
    rules = with_policy(options.first_last, session.prepared, wanted, options.rules)
    if options.everywhere:
        session = _without_unfit(session, wanted[0], rules)
    ready, allowed = _with_candidates(session, wanted, rules)
    formats = [scheme.weight for own in allowed.values() for scheme in own if scheme.weight is not None]
    options = replace(options, loss=loss_for(session, options.loss))
    require_numbers(options.rounding, formats)
    if (table := session.target.latency) is not None:
        table.require(digest_shapes(ready.layers), list(ready.quantizable), [site.name for site in ready.sites])
    settings: dict[str, Any] = {
        "schemes": [str(s) for s in wanted],
        "rules": repr(options.rules),
        "first_last": policy_record(options.first_last, ready.program, allowed, options.rules),
        "target": session.target.digest(),
        "seed": options.seed,
        **session.identity,
        **{name: value for name, value in chosen(options).items() if name not in ("first_last", FLOAT_STORAGE)},
        **({} if options.float_storage == FLOAT32 else {FLOAT_STORAGE: options.float_storage}),
        **({} if options.memory is None else {"memory": options.memory}),
    }
    by_rule = frozenset(name for name in ready.quantizable if decided_by_rule(name, options.rules, ready.layers))
    request = Request(session, ready, {name: allowed[name] for name in ready.quantizable}, settings, by_rule)
    return _with_estimator(request) if options.sensitivity == "auto" else request


def _with_estimator(request: Request) -> Request:
    """The request with an estimator by its size; the first of them where there is nothing to choose."""
    if all(len(options) < 2 for options in request.candidates.values()):
        return replace(request, settings=request.settings | {"sensitivity": MEASURED})
    places = len(request.candidates) + len(request.ready.sites)
    found = estimator_for(request.ready, request.batches, request.settings["loss"], len(request.entries()), places)
    return replace(request, settings=request.settings | {"sensitivity": found})


def _without_unfit(session: Session, scheme: Scheme, rules: Rules | None) -> Session:
    """The session with the layers float that cannot take the scheme and that no rule decides."""
    layers, target = session.prepared.layers, session.target
    weights = session.prepared.weights
    reasons = {n: why_float(layer, scheme, target) or why_not_half(weights, n, scheme) for n, layer in layers.items()}
    unfit = {
        n: why for n, why in reasons.items() if why and not layers[n].reason and not decided_by_rule(n, rules, layers)
    }
    return replace(session, prepared=leave_float(session.prepared, target, (), unfit)) if unfit else session


def _with_candidates(
    session: Session, wanted: Sequence[Scheme], rules: Rules | None
) -> tuple[Prepared, dict[str, tuple[Scheme, ...]]]:
    """The model with what its candidates leave float left float, and the candidates of every layer."""
    ready, inputs, target = session.prepared, session.inputs, session.target
    allowed = without_beyond_half(ready.weights, candidate_schemes(ready.layers, wanted, rules, target))
    require_kinds(ready.layers, allowed, target)
    offered = [s for name, options in allowed.items() if not ready.layers[name].weight_only for s in options]
    inputs.require_schemes(offered)
    tell_what_is_missing(inputs, offered)
    always_float = [name for name, options in allowed.items() if all(s.is_float for s in options)]
    if always_float:
        ready = leave_float(ready, target, always_float)
    ready = read_in_float(ready, target, [n for n in ready.quantizable if not any(s.has_codes for s in allowed[n])])
    return with_sites_of(ready, offered), allowed
