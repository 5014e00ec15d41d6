"""The last stage: quantize a model by a plan, and measure what that did to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from quantkit.errors import InvalidRequest, QuantkitError, did_you_mean
from quantkit.formats import ActivationFormat, Scheme, WeightFormat, check_group
from quantkit.numbers.packed_weight import stored_bytes
from quantkit.plan import (
    COMPOSITION,
    FLOAT,
    FLOAT_STORAGE,
    LEFT,
    TRANSFORMS,
    Composition,
    Plan,
    average_bits,
    digest_of,
)
from quantkit.program.input_shapes import varying_forms
from quantkit.program.sites import makers_of_codes
from quantkit.progress import notice
from quantkit.reconstruction.snapshot import Cache
from quantkit.rounding import require_numbers
from quantkit.sensitivity.damage import Reference, RunningDamage
from quantkit.sensitivity.measure import Subject
from quantkit.session import Session
from quantkit.simulation.model import SimulatedModel
from quantkit.simulation.quantized import QuantizedModel
from quantkit.stages.applying import PlanApplication, holds_probabilities
from quantkit.stages.auto import with_auto_decided
from quantkit.stages.beyond_half import require_half
from quantkit.stages.first_last import ends_of
from quantkit.stages.float_activations import (
    Trials,
    around_site,
    choices_of,
    to_measure,
    weights_read_float,
    with_left_float,
)
from quantkit.stages.formatted import Formatted
from quantkit.stages.loss_moments import loss_moments
from quantkit.stages.metric import Evaluate, metric_of
from quantkit.stages.options import FLOAT16, ApplyOptions, Run
from quantkit.stages.reparameterize import within_bytes
from quantkit.stages.result import Result
from quantkit.store import Artefacts
from quantkit.targets import OPERATOR_DOMAINS, Target
from quantkit.targets.instruction_sets import INSTRUCTION_SET
from quantkit.targets.rules import require_kinds
from quantkit.transforms.half_floats import store_floats_as_halves
from quantkit.transforms.prepare import (
    Prepared,
    leave_float,
    prepare_own,
    read_in_float,
    with_sites_of,
    without_sites,
)

AS_GIVEN = "as given"  # the policy on first and last layers in a plan that comes as a mapping
_ANY_WEIGHT = WeightFormat("8")


@dataclass(frozen=True)
class Application:
    """What applying a plan is asked for beside the plan: options, the user's metric, and how to run. ``inplace``: the
    user's own model is quantized. ``may_be_float``: layers that may be left float where their activations cost much.
    """

    options: ApplyOptions
    evaluate: Evaluate | None = None
    run: Run = field(default_factory=Run)
    inplace: bool = False
    may_be_float: tuple[str, ...] = ()


def apply_plan(session: Session, plan: Plan, asked: Application) -> Result:
    """Quantize the session's model by a plan; the prepared model becomes the result's. Raises InvalidRequest for a
    plan that does not fit the model or the target.
    """
    inputs, run, plan = session.inputs, asked.run, carried_out(session, plan)
    options = asked.options.with_inputs(inputs, schemes_to_check(plan, session))
    options = within_bytes(options, plan)
    formatted = formatted_by(session, plan)
    ready, options = formatted.ready, with_auto_decided(options, session, formatted)
    require_numbers(options.rounding, formatted.weights.values())
    reference = session.reference(options.loss)
    finished = _finished(run.workdir, session, options, plan)
    applying = PlanApplication.of(formatted, session.recording(ready), reference, options, finished)
    known = loss_moments(session, ready, options, run.progress, bool(applying.rewritten.notes))
    if asked.inplace:  # only now that nothing can be refused any more
        applying = applying.moved_to(prepare_own(ready, session.model))
    metrics = _metric("float", asked.evaluate, applying.ready.float_model())
    ready, target = applying.ready, target_of(session, plan)
    scaled = applying.rewritten.ratios  # their codes are of no use without the ratio
    choices = choices_of(ready, target, [name for name in asked.may_be_float if name not in scaled])
    some = to_measure(reference, choices)
    floats = {} if some is None else weights_read_float(ready)
    simulated, notes = applying.quantized(run.progress, finished, known)
    if some is not None:
        left = Trials(simulated, ready, target, some, floats, run.progress).left_float(choices)
        plan, ready = with_left_float(plan, left, ready, target)
    if ready.half_floats:
        store_floats_as_halves(simulated, ready.halves)
    plan = _recounted(plan, simulated, ready, formatted.sites, target)
    if scaled:
        plan = replace(plan, total_bytes=plan.total_bytes + applying.rewritten.stored_bytes)
    metrics |= compare_outputs(simulated, reference)
    metrics |= _metric("quantized", asked.evaluate, simulated)
    shapes = varying_forms(simulated.model, inputs.shown) if inputs.shown else ()
    return Result(simulated, plan, ready.folds, inputs.shown, metrics=metrics, notes=notes, shapes=shapes)


def schemes_to_check(plan: Plan, session: Session) -> list[Scheme]:
    """The schemes that calibration data has to fit: not those of layers with weights alone in codes, by their kind or
    because the plan leaves a site float that they read or make.
    """
    ready = session.prepared
    around = around_site(ready, session.target, ready.quantizable)
    floats = {name for site, layers in around.items() if plan.sites.get(site) == FLOAT for name in layers}
    alone = floats | {name for name, layer in ready.layers.items() if layer.weight_only}
    return [s for name, s in plan.schemes.items() if not (name in alone and s.activation is None)]


def target_of(session: Session, plan: Plan) -> Target:
    """The session's target with the instruction set that a plan's file is for."""
    return session.target.resolved(plan.provenance.get(INSTRUCTION_SET))


def carried_out(session: Session, plan: Plan) -> Plan:
    """A plan with what becomes of its schemes in the session's layers."""
    layers = session.prepared.layers
    carried = {n: layers[n].carried_out(scheme) if n in layers else scheme for n, scheme in plan.schemes.items()}
    return replace(plan, schemes=carried)


def formatted_by(session: Session, plan: Plan) -> Formatted:
    """The session's float model with the formats of a plan. Raises InvalidRequest for a plan that does not fit."""
    target, plan = target_of(session, plan), carried_out(session, plan)
    left = dict.fromkeys(_kept_float(session, plan), LEFT)
    ready = leave_float(session.prepared, target, (), left)
    ready = read_in_float(ready, target, [name for name in ready.quantizable if not plan.schemes[name].has_codes])
    ready = _coded(ready, plan, target)
    weights = {n: weight for n in ready.quantizable if (weight := plan.schemes[n].weight) is not None}
    sites = _site_formats(plan, ready, target)
    return Formatted(ready, weights, sites, session.inputs.batches, session.standing)


def _finished(workdir: Path | None, session: Session, options: ApplyOptions, plan: Plan) -> Cache:
    """Where every finished piece of work is kept, keyed by all that decides it."""
    if workdir is None:
        return Cache()
    settings = session.identity | asdict(options)
    settings |= {TRANSFORMS: [change.record() for change in session.prepared.changes]}
    settings |= {"plan": plan.digest(), "target": session.target.digest(), "torch": torch.__version__}
    folder = workdir / f"applied-{digest_of(settings)}"
    if folder.exists():
        notice(f"going on from what is finished in {folder}")
    return Cache(Artefacts(folder))


def _metric(name: str, evaluate: Evaluate | None, model: SimulatedModel) -> dict[str, float]:
    return {} if evaluate is None else {name: metric_of(evaluate, QuantizedModel.of(model))}


def _coded(ready: Prepared, plan: Plan, target: Target) -> Prepared:
    """With the sites that the plan's activations need, and without those that it leaves float. Raises InvalidRequest
    where these have to hold codes.
    """
    ready = with_sites_of(ready, plan.schemes.values())
    on_codes = [name for name in ready.quantizable if plan.schemes[name].activation is not None]
    made = makers_of_codes(ready.program, target, on_codes)
    for site in ready.sites:
        if plan.sites.get(site.name) != FLOAT:
            continue
        if asked := {c: a for c in site.consumers if (a := plan.schemes[c].activation) is not None}:
            raise _contradiction(site.name, {**asked, f"site {site.name}": FLOAT})
        if (role := target.role_of_codes(site.roles)) and site.place in made:
            raise InvalidRequest(
                f"The plan leaves site {site.name!r} float, which is a {role}, and {target.name} needs codes there."
            )
    return without_sites(ready, [name for name, fmt in plan.sites.items() if fmt == FLOAT])


def require_layers(model: nn.Module, plan: Plan, target: Target) -> None:
    """Raise InvalidRequest for what can be told of a plan before the data is read."""
    known = [name for name, _ in (*model.named_modules(), *model.named_parameters()) if name]
    for name, scheme in plan.schemes.items():
        if not any(name == one or name.startswith((f"{one}.", f"{one}[", f"{one}/")) for one in known):
            hint = did_you_mean(name, known)
            raise InvalidRequest(f"The plan names layer {name!r}, which the model does not have.{hint}")
        if reason := target.refusal(scheme):
            raise InvalidRequest(f"The plan gives layer {name!r} {scheme}: {reason}.")
    if all(scheme.is_float for scheme in plan.schemes.values()):
        raise InvalidRequest("The plan quantizes no layer: every scheme in it is 'float'.")


def _kept_float(session: Session, plan: Plan) -> list[str]:
    """The layers that the plan leaves float, after checking that the plan fits the model."""
    every, target = session.prepared, session.target
    for name, scheme in plan.schemes.items():
        if name not in every.layers:
            hint = did_you_mean(name, list(every.layers))
            raise InvalidRequest(f"{name!r} in the plan owns no weight to quantize.{hint}")
        if not scheme.is_float and every.layers[name].reason:
            raise InvalidRequest(f"The plan gives layer {name!r} {scheme}, but {every.layers[name].reason}.")
        if scheme.weight is not None:
            check_group(name, scheme.weight, every.layers[name].shape)
        require_half(every.weights, name, scheme)
    require_kinds(every.layers, {name: [scheme] for name, scheme in plan.schemes.items()}, target)
    _check_size(plan, every)
    known = [site.name for site in (*every.sites, *with_sites_of(every, plan.schemes.values()).sites)]
    for name in plan.sites:
        if name not in known:
            hint = did_you_mean(name, known)
            raise InvalidRequest(f"The plan names site {name!r}, which the model does not have.{hint}")
    quantized = {name for name, scheme in plan.schemes.items() if not scheme.is_float}
    return [name for name in every.layers if name not in quantized]


def _check_size(plan: Plan, ready: Prepared) -> None:
    size = sum(layer.weight_bytes(plan.schemes.get(name, Scheme())) for name, layer in ready.layers.items())
    if plan.size_bytes and size != plan.size_bytes:
        raise InvalidRequest(
            f"The plan promises {plan.size_bytes:,} bytes of weights, its schemes take {size:,}. If it was edited by "
            "hand, set its size_bytes to 0; otherwise it belongs to another model."
        )


def _site_formats(plan: Plan, ready: Prepared, target: Target) -> dict[str, ActivationFormat]:
    """The format of each site: that of the layers reading it, else the plan's, else the widest the plan uses.

    Raises InvalidRequest where the plan contradicts itself or asks for what the target cannot run.
    """
    used = [s.activation for s in plan.schemes.values() if s.activation is not None]
    if not used:
        return {}
    widest = max(used, key=lambda a: a.bits)
    formats = {}
    for site in ready.sites:
        asked = {c: a for c in site.consumers if (a := plan.schemes[c].activation) is not None}
        if site.name in plan.sites:
            asked[f"site {site.name}"] = _activation(site.name, plan.sites[site.name])
        if len(set(asked.values())) > 1:
            raise _contradiction(site.name, asked)
        formats[site.name] = next(iter(asked.values()), widest)
        if formats[site.name].fmt == "log4" and holds_probabilities(site):
            continue
        if reason := target.refusal(Scheme(_ANY_WEIGHT, formats[site.name])):
            raise InvalidRequest(f"The plan gives site {site.name!r} {formats[site.name]}: {reason}.")
    return formats


def _contradiction(site: str, asked: Mapping[str, ActivationFormat | str]) -> InvalidRequest:
    given = ", ".join(f"{name} {fmt}" for name, fmt in asked.items())
    return InvalidRequest(f"The plan asks for several formats of one tensor, {site!r}: {given}. Give it one.")


def _activation(site: str, text: str) -> ActivationFormat:
    scheme = Scheme.parse(text)
    if scheme.activation is None or scheme.weight is not None:
        raise InvalidRequest(f"The plan gives site {site!r} {text!r}, which is no activation format such as 'a8'.")
    return scheme.activation


def _recounted(
    plan: Plan, simulated: SimulatedModel, ready: Prepared, formats: Mapping[str, ActivationFormat], target: Target
) -> Plan:
    """The plan with sizes counted from what was packed; raises QuantkitError if they are not what it promised."""
    packed = {name: stored_bytes(weight) for name, weight in simulated.weights.items()}
    size = sum(packed.get(name, layer.float_bytes) for name, layer in ready.layers.items())
    if plan.size_bytes and size != plan.size_bytes:
        raise QuantkitError(
            f"The plan promised {plan.size_bytes:,} bytes of weights, {size:,} were packed. Please report this."
        )
    # probabilities may have got logarithmic codes
    found = {name: one.format for name, one in simulated.ranges.items()}
    sites = {name: str(found.get(name, asked)) for name, asked in formats.items()}
    return replace(
        plan,
        schemes={name: plan.schemes.get(name, Scheme()) for name in ready.layers},
        why={name: f"float: {layer.reason}" for name, layer in ready.layers.items() if layer.reason} | plan.why,
        sites=sites | {name: fmt for name, fmt in plan.sites.items() if fmt == FLOAT and sites},
        size_bytes=size,
        total_bytes=size + ready.other_bytes,
        average_bits=average_bits(ready.layers, size),
        provenance={
            "first_last": {"policy": AS_GIVEN, **ends_of(ready.program)},
            "target": target.name,
            **{key: value for key, value in plan.provenance.items() if key != FLOAT_STORAGE},
            **_composition(plan, ready, size + ready.other_bytes),
            **({FLOAT_STORAGE: FLOAT16} if ready.half_floats else {}),
            INSTRUCTION_SET: target.instruction_set,
            OPERATOR_DOMAINS: list(target.operator_domains),
        },
    )


def _composition(plan: Plan, ready: Prepared, total: int) -> dict[str, str]:
    """What the bytes consist of, for the provenance; a plan that counted the same knows more of the reasons."""
    if COMPOSITION in plan.provenance and plan.total_bytes == total:
        return {}
    return {COMPOSITION: str(Composition.of(ready.layers, plan.schemes, ready.other_bytes, ready.float_bytes))}


def compare_outputs(model: nn.Module, reference: Reference) -> dict[str, float]:
    """Damage, and agreement of the answer's largest output with the float model's, on the calibration inputs; nothing
    without any.
    """
    if not reference.batches:
        return {}
    rule, running, same = reference.damage.rule, RunningDamage(reference.damage), []
    subject = Subject(model, reference.batches, {}, rule=rule)
    for before, after in zip(reference.outputs, subject.outputs(), strict=True):
        running.update(before, after)
        same.append(before[rule.main].argmax(-1) == after[rule.main].argmax(-1))
    return {"calibration_damage": running.mean, "calibration_agreement": float(torch.cat(same).float().mean())}
