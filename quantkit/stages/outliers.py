"""Which transforms a model gets before it is quantized: each proves that outputs stay, and is kept where it lowers the
damage of the narrowest formats on calibration samples that were held back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from quantkit.errors import InvalidRequest
from quantkit.formats import EIGHT_BITS
from quantkit.numbers.kinds import AnyRange, token_range
from quantkit.plan import TRANSFORMS as RECORDED
from quantkit.plan import Plan
from quantkit.program.inputs import Batch, batch_size, numbered_samples
from quantkit.progress import notice, warn
from quantkit.ranges.activations import RANGES
from quantkit.ranges.statistics import site_histograms
from quantkit.rounding.weights import quantize_weight
from quantkit.sensitivity.damage import Reference
from quantkit.sensitivity.measure import Subject
from quantkit.session import Session
from quantkit.stages.apply import formatted_by
from quantkit.stages.auto import loss_for
from quantkit.stages.formatted import Formatted
from quantkit.stages.options import ApplyOptions, asked_transforms
from quantkit.stages.request import Request
from quantkit.transforms.change import Change
from quantkit.transforms.known import ROTATIONS, SCALINGS, TRANSFORMS
from quantkit.transforms.norms import normalizations
from quantkit.transforms.plain_weights import copy_with_computed_tensors
from quantkit.transforms.prepare import Prepared
from quantkit.transforms.registry import Setting

SAMPLES = 80  # that transforms are chosen by
HELD_BACK = 5  # one sample in so many decides
RANGED = 4  # of the others one in so many finds the ranges to decide with
EXACT = 1e-4  # of the largest output: as much may change in float32
BETTER = 0.95  # of the damage without it is where a transform begins


@dataclass(frozen=True)
class Trial:
    """What transforms are tried with: the float model with its narrowest formats, samples to find them by and samples
    held back, with the float outputs on these; how ranges are found.
    """

    formatted: Formatted
    fit: Sequence[Batch]
    reference: Reference
    ranges: str
    seed: int

    @classmethod
    def of(cls, formatted: Formatted, loss: str, ranges: str, seed: int) -> Trial:
        ready = formatted.ready
        fit, held = split(formatted.batches)
        subject = Subject(ready.model, held, {}, loss, weights=ready.weights, program=ready.program)
        return cls(formatted, fit, Reference.of(subject), ranges, seed)

    def setting(self, ready: Prepared) -> Setting:
        return Setting(ready, self.fit, self.formatted.weights, self.formatted.sites, self.seed)

    def copy(self, changes: Sequence[Change]) -> Prepared:
        """A copy of the float model with these changes."""
        ready = self.formatted.ready
        own = copy_with_computed_tensors(ready.model)
        return changed(replace(ready, model=own, weights=ready.weights.on(own)), changes)

    def difference(self, ready: Prepared) -> float:
        """How much outputs differ from the float model's, as a share of the largest."""
        pairs = zip(self._subject(ready).outputs(), self.reference.outputs, strict=True)
        shares = [
            float((one - other).abs().max() / other.abs().max().clamp(min=1e-30))
            for found, wanted in pairs
            for one, other in zip(found, wanted, strict=True)
            if other.numel()
        ]
        return max(shares, default=0.0)

    def damage(self, ready: Prepared) -> float:
        """The damage with all that may get codes in its narrowest format; the weights of ``ready`` are rounded."""
        weights, sites = self.formatted.weights, self.formatted.sites
        dynamic = [site.name for site in ready.sites if sites[site.name].dynamic]
        ranges: dict[str, AnyRange] = {name: token_range(sites[name]) for name in dynamic}
        static = [site for site in ready.sites if site.name not in ranges]
        some = numbered_samples(self.fit, lambda order: order % RANGED == 0)
        found = site_histograms(ready.model, static, some, False, ready.padding)
        ranges |= {name: RANGES[self.ranges](histogram, sites[name].bits) for name, histogram in found.items()}
        for name, format in weights.items():
            groups = ready.weights.layers[name].groups
            rounded = quantize_weight(ready.weights[name], [format], groups=groups, rounding="nearest")
            ready.weights.write(name, rounded.weights[format].dequantize())
        subject = self._subject(ready)
        at = {name: own.fake_quantize for name, own in ranges.items()}
        return self.reference.damage_of(subject.outputs_with({}, at)).mean

    def kept(self, proposed: Mapping[str, tuple[Change, ...]]) -> Kept:
        """Changes, and the damage with all of them."""
        return Kept(proposed, self.damage(self.copy(_joined(proposed))))

    def _subject(self, ready: Prepared) -> Subject:
        sites = {site.name: site for site in ready.sites}
        rule = self.reference.damage.rule
        held = self.reference.batches
        return Subject(ready.model, held, sites, weights=ready.weights, program=ready.program, rule=rule)


def split(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Samples to find transforms by, evenly spaced, and samples to decide by; the same ones where there are few."""
    stride = max(1, sum(batch_size(batch) for batch in batches) // SAMPLES)
    drawn = numbered_samples(batches, lambda order: order % stride == 0)
    held = numbered_samples(drawn, lambda order: order % HELD_BACK == HELD_BACK - 1)
    fit = numbered_samples(drawn, lambda order: order % HELD_BACK != HELD_BACK - 1)
    return (fit, held) if held else (drawn, drawn)


def changed(ready: Prepared, changes: Sequence[Change]) -> Prepared:
    """A float model with further changes, made in place."""
    for change in changes:
        change.apply(ready.weights)
    return replace(ready, changes=(*ready.changes, *changes))


def transformed(request: Request, asked: str) -> Request:
    """A request with its model transformed as is asked for, and what was done among its settings."""
    ready = request.ready
    weights = {
        name: min((s.weight for s in schemes if s.weight is not None), key=lambda format: format.bits)
        for name, schemes in request.candidates.items()
        if any(s.weight is not None for s in schemes)
    }
    narrowest = min(request.site_formats, key=lambda format: format.bits, default=None)
    sites = {} if narrowest is None else {site.name: narrowest for site in ready.sites}
    formatted = Formatted(ready, weights, sites, request.batches)
    changes = decided(formatted, asked, request.settings)
    if not changes:
        return request
    ready = changed(ready, changes)
    request.session.prepared = replace(request.session.prepared, changes=ready.changes)
    return replace(request, ready=ready, settings=request.settings | {RECORDED: records_of(changes)})


@dataclass(frozen=True)
class Kept:
    """The changes of each transform that are kept, by name, and the damage with all of them."""

    proposed: Mapping[str, tuple[Change, ...]]
    damage: float

    @property
    def changes(self) -> tuple[Change, ...]:
        return _joined(self.proposed)

    def __str__(self) -> str:
        return ", ".join(f"{name} at {len(some)} places" for name, some in self.proposed.items()) or "none"


def decided(formatted: Formatted, asked: str, settings: Mapping[str, Any]) -> tuple[Change, ...]:
    """The changes that transforms make of a model, which stays as it is: of those asked for by name all that leave
    outputs as they are; with "auto" those that lower the damage, without rotations or, where that is clearly better,
    with rotations behind them.
    """
    names = asked_transforms(asked)
    if not names or not formatted.batches or not formatted.ready.program.steps:
        return ()
    if asked == "auto" and not _may_gain(formatted):
        return ()
    trial = Trial.of(formatted, settings["loss"], settings["ranges"], settings["seed"])
    if asked != "auto":
        return _joined(_proposals(trial, names))
    scaled = _proposals(trial, SCALINGS)
    turned = _proposals(trial, ROTATIONS, scaled)
    if not turned:
        return ()
    plain = Kept({}, trial.damage(trial.copy(())))
    best = trial.kept(scaled) if scaled else plain
    if len(turned) > len(scaled):
        other = trial.kept(turned)
        best = other if other.damage < BETTER * best.damage else best
    best = _worthwhile(trial, plain, best)
    notice(
        f"transforms: {best}; damage of the narrowest formats on samples held back {best.damage:.3g}, "
        f"{plain.damage:.3g} without"
    )
    return _made_again(trial, records_of(best.changes))


def _joined(proposed: Mapping[str, Sequence[Change]]) -> tuple[Change, ...]:
    return tuple(change for some in proposed.values() for change in some)


def _proposals(
    trial: Trial, names: Sequence[str], given: Mapping[str, tuple[Change, ...]] | None = None
) -> dict[str, tuple[Change, ...]]:
    """What transforms would change, each behind those before it, and leave outputs as they are."""
    found = dict(given or {})
    for name in names:
        before = _joined(found)
        changes = TRANSFORMS[name].propose(trial.setting(trial.copy(before))).changes
        if exact := _exact(trial, name, before, changes):
            found[name] = exact
    return found


def _worthwhile(trial: Trial, plain: Kept, every: Kept) -> Kept:
    """Of changes that were measured together those of transforms without which the damage is clearly larger. They are
    not measured alone: one of several outliers that is left hides what is gained by the others.
    """
    kept = every
    for name in every.proposed:
        others = {other: some for other, some in kept.proposed.items() if other != name}
        without = trial.kept(others) if others else plain
        kept = without if kept.damage >= BETTER * without.damage else kept
    return kept


def _made_again(trial: Trial, records: Sequence[Mapping[str, Any]]) -> tuple[Change, ...]:
    """The changes of records on the float model of a trial, in their order: as a plan is applied later."""
    made: tuple[Change, ...] = ()
    for name, some in groupby(records, key=lambda record: str(record["transform"])):
        made += TRANSFORMS[name].redo(trial.setting(trial.copy(made)), [*some])
    return made


def _may_gain(formatted: Formatted) -> bool:
    """Whether anything gets codes whose steps depend on how even channels are, in a network with norms: between
    convolutions GPTQ makes of its own what scaling gains with weights rounded to nearest.
    """
    grouped = any(weight.group and weight.bits < EIGHT_BITS for weight in formatted.weights.values())
    return (grouped or bool(formatted.sites)) and bool(normalizations(formatted.ready)[0])


def _exact(trial: Trial, name: str, kept: Sequence[Change], proposed: Sequence[Change]) -> tuple[Change, ...]:
    """The proposed changes that leave outputs as they are; those that do not are named in a warning."""
    if not proposed or trial.difference(trial.copy((*kept, *proposed))) < EXACT:
        return tuple(proposed)
    exact: list[Change] = []
    for change in proposed:
        if (share := trial.difference(trial.copy((*kept, *exact, change)))) < EXACT:
            exact.append(change)
        else:
            warn(f"{name} at {change.record()['at']} changes outputs by {share:.1g} of the largest: left out")
    return tuple(exact)


def records_of(changes: Sequence[Change]) -> list[dict[str, Any]]:
    """What a plan says of changes."""
    return [change.record() for change in changes]


def transformed_by(session: Session, plan: Plan, asked: str, options: ApplyOptions) -> Plan:
    """Change a session's model, in place, as a plan records it or, with a plan that comes as a mapping or with names
    of transforms, as is decided for its formats; the plan says which. Raises InvalidRequest where the model or the
    data does not allow what is recorded.
    """
    if asked == "auto" and plan.provenance:
        _redo(session, plan.provenance.get(RECORDED, []))
        return plan
    others = {key: value for key, value in plan.provenance.items() if key != RECORDED}
    settings = {"loss": loss_for(session, options.loss), "ranges": options.ranges, "seed": options.seed}
    changes = decided(formatted_by(session, plan), asked, settings)
    session.prepared = changed(session.prepared, changes)
    return replace(plan, provenance=others | ({RECORDED: records_of(changes)} if changes else {}))


def _redo(session: Session, recorded: Sequence[Mapping[str, Any]]) -> None:
    if not recorded:
        return
    if not session.inputs.batches:
        raise InvalidRequest(
            "The plan was made with transforms, whose factors are found on data: pass calibration=, the data that the "
            "plan was made with; or transforms='none' to apply it without any."
        )
    if unknown := {str(record["transform"]) for record in recorded} - {*TRANSFORMS}:
        known = ", ".join(TRANSFORMS)
        raise InvalidRequest(f"The plan records an unknown transform {min(unknown)!r}; known: {known}.")
    trial = Trial.of(Formatted(session.prepared, {}, {}, session.inputs.batches), "auto", "mse", 0)
    session.prepared = changed(session.prepared, _made_again(trial, recorded))
    if (share := trial.difference(session.prepared)) >= EXACT:
        raise InvalidRequest(
            f"The plan's transforms change the model's outputs by {share:.1g} of the largest: it is not the model "
            "that the plan was made for. transforms='none' applies the plan without any."
        )
