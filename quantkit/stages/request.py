"""A request checked and made ready: everything that can be known, or be wrong, before anything is measured."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from torch import Size, nn

from quantkit.errors import InvalidRequest, did_you_mean
from quantkit.formats import ActivationFormat, Scheme
from quantkit.plan import Profile, SiteRecord, digest_of, digest_shapes
from quantkit.program.inputs import Batch, digest_batches, digest_model
from quantkit.program.operations import operations_of
from quantkit.program.trace import Trace
from quantkit.ranges.activations import RANGES
from quantkit.reconstruction.blocks import RECONSTRUCTIONS
from quantkit.reconstruction.corrections import CORRECTIONS
from quantkit.rounding.weights import ROUNDINGS
from quantkit.sensitivity import ESTIMATORS, require_additive
from quantkit.sensitivity.measure import Scores
from quantkit.sensitivity.outputs import LOSSES
from quantkit.stages.first_last import FIRST_LAST, SAME, policy_record, with_policy
from quantkit.stages.inputs import Inputs, require_accepted, tell_what_is_missing
from quantkit.stages.reparameterize import REPARAMETERIZATIONS
from quantkit.targets import Target
from quantkit.targets.rules import Rules, candidate_schemes, parse_schemes, require_kinds, weights_only
from quantkit.transforms.prepare import Prepared, leave_float, with_sites_of
from quantkit.version import VERSION

DEFAULT_TARGET = "onnxruntime-cpu"
Schemes = Iterable[str | Scheme]
TargetName = str | os.PathLike[str] | Target
CHOICES: dict[str, tuple[str, ...]] = {
    "sensitivity": ("auto", *ESTIMATORS),
    "rounding": ROUNDINGS,
    "ranges": tuple(RANGES),
    "reconstruction": RECONSTRUCTIONS,
    "correction": CORRECTIONS,
    "reparameterization": REPARAMETERIZATIONS,
    "loss": ("auto", *LOSSES),
    "first_last": FIRST_LAST,
}


@dataclass(frozen=True)
class Request:
    """The prepared model, its inputs, the candidates of every layer, and what else decides the result."""

    ready: Prepared
    inputs: Inputs
    candidates: dict[str, tuple[Scheme, ...]]
    target: Target
    settings: dict[str, Any]

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
            provenance=self.settings | dict(provenance),
            saturation=scores.saturation,
            growth=scores.growth,
            operations=operations_of(ready.trace, ready.sites, self.target),
            latency=self.target.latency,
        )

    def with_latency(self, profile: Profile) -> Profile:
        """A profile measured earlier, with this target's latency table."""
        return replace(profile, latency=self.target.latency)

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
    schemes: Schemes | None = None,
    samples: int | None = None,
    loss: str = "auto",
    target: TargetName = DEFAULT_TARGET,
    rules: Rules | None = None,
    first_last: str = SAME,
    sensitivity: str = "auto",
    rounding: str = "auto",
    ranges: str = "mse",
    seed: int = 0,
) -> Request:
    """Check a request and prepare the model. Raises InvalidRequest, cheapest checks first."""
    goal = Target.load(target)
    asked = {"sensitivity": sensitivity, "rounding": rounding, "ranges": ranges, "loss": loss}
    require_choices(first_last=first_last, **asked)
    require_additive(sensitivity)
    wanted = parse_schemes(schemes, goal)
    inputs = Inputs.of(model, calibration, example_inputs, samples)
    if schemes is None and not inputs.batches:
        wanted = weights_only(wanted)
    asked |= {"sensitivity": inputs.sensitivity(sensitivity), "rounding": inputs.rounding(rounding)}
    ready = inputs.prepared(model, goal)
    require_accepted(ready.model, inputs.batches)
    every_rule = with_policy(first_last, ready, wanted, rules)
    ready, allowed = _with_candidates(ready, inputs, wanted, every_rule, goal)
    require_own_table(goal, ready)
    settings: dict[str, Any] = {
        "schemes": [str(s) for s in wanted],
        "rules": repr(rules),
        "first_last": policy_record(first_last, ready.trace, allowed, rules),
        "target": digest_of(asdict(replace(goal, latency=None))),
        "seed": seed,
        **identity_of(model, inputs, ready.trace),
        **asked,
    }
    return Request(ready, inputs, {name: allowed[name] for name in ready.quantizable}, goal, settings)


def _with_candidates(
    ready: Prepared, inputs: Inputs, wanted: Sequence[Scheme], rules: Rules | None, target: Target
) -> tuple[Prepared, dict[str, tuple[Scheme, ...]]]:
    """The model with what its candidates leave float left float, and the candidates of every layer."""
    allowed = candidate_schemes(ready.layers, wanted, rules, target)
    require_kinds(ready.layers, allowed, target)
    offered = [scheme for options in allowed.values() for scheme in options]
    inputs.require_schemes(offered)
    tell_what_is_missing(inputs, offered)
    always_float = [name for name, options in allowed.items() if all(s.is_float for s in options)]
    if always_float:
        ready = leave_float(ready, target, always_float)
    return with_sites_of(ready, offered), allowed


def require_own_table(target: Target, ready: Prepared) -> None:
    """Raise InvalidRequest where the target's latency table was measured on another model."""
    if target.latency is not None:
        sites = [site.name for site in ready.sites]
        target.latency.require(digest_shapes(ready.layers), list(ready.quantizable), sites)


def identity_of(model: nn.Module, inputs: Inputs, trace: Trace) -> dict[str, str]:
    """What every figure and every code depends on, whatever is asked for: the model, the data and this version."""
    return {
        "model": digest_model(model),
        "operations": _digest_operations(trace),
        "calibration": digest_batches(inputs.shown),
        "quantkit": VERSION,
    }


def _digest_operations(trace: Trace) -> str:
    """Identifies what a model computes: its class and weights stay the same while its ``forward`` is being edited."""
    return digest_of(
        [[str(op.key), op.inputs, op.outputs, [repr(a) for a in op.arguments if _is_plain(a)]] for op in trace.ops]
    )


def _is_plain(value: Any) -> bool:
    """True for what prints the same in every process."""
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def choose(name: str, value: str, known: Iterable[str] | Mapping[str, Any]) -> None:
    """Raise InvalidRequest, with the known names, for a name that is none of them."""
    if value not in (names := list(known)):
        raise InvalidRequest(f"Unknown {name} {value!r}; known: {', '.join(names)}.{did_you_mean(str(value), names)}")


def require_choices(**asked: str) -> None:
    """Raise InvalidRequest for a name that is not among the ``CHOICES`` of its argument."""
    for name, value in asked.items():
        choose(name, value, CHOICES[name])
