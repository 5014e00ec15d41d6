"""The last stage: quantize a model by a plan, and measure what that did to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import InvalidRequest, QuantkitError, did_you_mean
from quantkit.formats import ActivationFormat, Scheme, WeightFormat, check_group
from quantkit.numbers.kinds import AnyRange
from quantkit.numbers.packed_weight import pack_weight
from quantkit.plan import Plan, average_bits, digest_of
from quantkit.program.inputs import Batch
from quantkit.progress import notice
from quantkit.reconstruction.snapshot import Cache
from quantkit.sensitivity.measure import Subject, damage_for
from quantkit.simulation.model import SimulatedModel, as_float
from quantkit.stages.applying import ApplyOptions, PlanApplication, holds_probabilities
from quantkit.stages.first_last import ends_of
from quantkit.stages.inputs import Inputs, require_accepted
from quantkit.stages.metric import Evaluate, metric_of, require_metric
from quantkit.stages.request import DEFAULT_TARGET, TargetName, identity_of
from quantkit.stages.result import Result
from quantkit.store import Artefacts, require_writable
from quantkit.targets import Target
from quantkit.targets.rules import require_kinds
from quantkit.transforms.prepare import Prepared, leave_float, with_sites_of

AS_GIVEN = "as given"  # the policy on first and last layers in a plan that comes as a mapping
_ANY_WEIGHT = WeightFormat("8")


def apply(
    model: nn.Module,
    plan: Plan | Mapping[str, str | Scheme],
    calibration: Any = None,
    *,
    example_inputs: Any = None,
    samples: int | None = None,
    target: TargetName = DEFAULT_TARGET,
    rounding: str = "auto",
    ranges: str = "mse",
    reconstruction: str = "auto",
    correction: str | None = "auto",
    reparameterization: str = "auto",
    loss: str = "auto",
    evaluate: Evaluate | None = None,
    seed: int = 0,
    progress: bool = True,
    workdir: str | Path | None = None,
    inplace: bool = False,
) -> Result:
    """Quantize ``model`` by ``plan`` (a Plan, or a mapping layer name -> scheme; layers not named stay float).

    Layers are rounded one after the other, each on the inputs it gets from the network quantized so far. Then codes,
    scales, biases and activation steps are learned by the damage of the output, on mixes of the calibration inputs:
    ``reconstruction="network"``; "block" learns block by block first, "adaquant" and "adaquant-parallel" only
    layer by layer, "none" keeps what was rounded. "auto" learns where there are at least 64 samples: blocks first for
    weights of up to 3 bits or activations below 8, the network alone for weights of up to 5 bits. Where
    nothing is learned, ``correction="auto"`` moves scales and biases by statistics ("norm", "bias") and biases by the
    damage ("tuning"). Each can be asked for alone, as can "confidence", a factor on logits, also after learning; None
    is off. What does not help on inputs that were held back is undone; ``Result.notes`` says what did. Images are also
    learned from mirrored and shifted, where the float outputs hardly change.

    ``reparameterization`` is for transformers. Before anything is rounded, outputs of LayerNorms get a range for each
    channel ("norm"), its clipping learned ("clip"), and norms and the layers behind them are rewritten so that one
    range does the same, where that lowers the error behind them; 4-bit probabilities of attention get logarithmic
    codes ("softmax"). Joined by +; "auto" is "clip+softmax".

    ``evaluate`` (model -> a number, or one for each sample, higher is better) is reported for the float and for the
    quantized model; it must not use the calibration data. Without ``calibration`` plans of weights alone are met, by
    HQQ; ``example_inputs`` then lets BatchNorm be folded. With ``workdir`` every layer is kept there as soon as it is
    rounded, and every block, correction and the network as soon as it is learned, under a key of everything they
    depend on: the same call again, after a kill or not, does none of that twice. Raises InvalidRequest for a plan
    that does not fit the model or the target.
    """
    goal, decided = Target.load(target), Plan.of(plan)
    options = ApplyOptions(rounding, ranges, reconstruction, correction or "none", loss, seed, reparameterization)
    _check_request(model, decided, goal, evaluate, workdir)
    inputs = Inputs.of(model, calibration, example_inputs, samples)
    options, batches = options.with_inputs(inputs, decided.schemes.values()), inputs.batches
    every = inputs.prepared(model, goal)
    kept_float = _kept_float(every, decided, batches, goal)
    ready = _coded(leave_float(every, goal, kept_float), decided)
    formats = _site_formats(decided, ready, goal)
    reference = list(Subject(ready.model, batches, {}).outputs())
    finished = _finished(workdir, partial(identity_of, model, inputs, every.trace), options, decided, goal)
    bench = PlanApplication.of(ready, _weight_formats(decided, ready), formats, batches, reference, options, finished)
    if inplace:  # only now that nothing can be refused any more
        bench = bench.moved_to(_coded(inputs.prepared(model, goal, kept_float, inplace=True), decided))
    metrics = _metric("float", evaluate, as_float(bench.ready.model))
    simulated, notes = bench.quantized(progress, finished)
    decided = _recounted(decided, simulated, bench.ready, formats)
    metrics |= compare_outputs(simulated, batches, reference, loss) | _metric("quantized", evaluate, simulated)
    return Result(simulated, decided, ready.folds, inputs.shown, metrics=metrics, notes=notes)


def _finished(
    workdir: str | Path | None,
    identity: Callable[[], dict[str, str]],
    options: ApplyOptions,
    plan: Plan,
    target: Target,
) -> Cache:
    """Where every finished piece of work is kept, keyed by all that decides it."""
    if workdir is None:
        return Cache()
    timeless = digest_of(asdict(replace(target, latency=None)))
    settings = identity() | asdict(options) | {"plan": plan.digest(), "target": timeless, "torch": torch.__version__}
    folder = Path(workdir) / f"applied-{digest_of(settings)}"
    if folder.exists():
        notice(f"going on from what is finished in {folder}")
    return Cache(Artefacts(folder))


def _metric(name: str, evaluate: Evaluate | None, model: nn.Module) -> dict[str, float]:
    return {} if evaluate is None else {name: metric_of(evaluate, model)}


def _coded(ready: Prepared, plan: Plan) -> Prepared:
    """With the sites that the plan's activations need."""
    return with_sites_of(ready, plan.schemes.values())


def _weight_formats(plan: Plan, ready: Prepared) -> dict[str, WeightFormat]:
    return {n: s.weight for n in ready.quantizable if (s := plan.schemes[n]).weight is not None}


def _check_request(
    model: nn.Module, plan: Plan, target: Target, evaluate: Evaluate | None, workdir: str | Path | None
) -> None:
    """Raise InvalidRequest for what can be told before the data is read."""
    require_metric(evaluate)
    if workdir is not None:
        require_writable(workdir)
    known = [name for name, _ in model.named_modules() if name]
    for name, scheme in plan.schemes.items():
        if name not in known:
            hint = did_you_mean(name, known)
            raise InvalidRequest(f"The plan names layer {name!r}, which the model does not have.{hint}")
        if reason := target.refusal(scheme):
            raise InvalidRequest(f"The plan gives layer {name!r} {scheme}: {reason}.")
    if all(scheme.is_float for scheme in plan.schemes.values()):
        raise InvalidRequest("The plan quantizes no layer: every scheme in it is 'float'.")


def _kept_float(every: Prepared, plan: Plan, batches: list[Batch], target: Target) -> list[str]:
    """The layers that the plan leaves float, after checking that the plan fits the model."""
    require_accepted(every.model, batches)
    for name, scheme in plan.schemes.items():
        if name not in every.layers:
            hint = did_you_mean(name, list(every.layers))
            raise InvalidRequest(f"{name!r} in the plan owns no weight to quantize.{hint}")
        if not scheme.is_float and every.layers[name].reason:
            raise InvalidRequest(f"The plan gives layer {name!r} {scheme}, but {every.layers[name].reason}.")
        if scheme.weight is not None:
            check_group(name, scheme.weight, every.layers[name].shape)
    require_kinds(every.layers, {name: [scheme] for name, scheme in plan.schemes.items()}, target)
    _check_size(plan, every)
    known = [site.name for site in (*every.sites, *_coded(every, plan).sites)]
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
            given = ", ".join(f"{name} {fmt}" for name, fmt in asked.items())
            raise InvalidRequest(
                f"The plan asks for several formats of one tensor, {site.name!r}: {given}. Give it one."
            )
        formats[site.name] = next(iter(asked.values()), widest)
        if formats[site.name].fmt == "log4" and holds_probabilities(site):
            continue
        if reason := target.refusal(Scheme(_ANY_WEIGHT, formats[site.name])):
            raise InvalidRequest(f"The plan gives site {site.name!r} {formats[site.name]}: {reason}.")
    return formats


def _activation(site: str, text: str) -> ActivationFormat:
    scheme = Scheme.parse(text)
    if scheme.activation is None or scheme.weight is not None:
        raise InvalidRequest(f"The plan gives site {site!r} {text!r}, which is no activation format such as 'a8'.")
    return scheme.activation


def _recounted(
    plan: Plan, simulated: SimulatedModel, ready: Prepared, formats: Mapping[str, ActivationFormat]
) -> Plan:
    """The plan with sizes counted from what was packed; raises QuantkitError if they are not what it promised."""
    packed = {name: pack_weight(weight).nbytes for name, weight in simulated.weights.items()}
    size = sum(packed.get(name, layer.float_bytes) for name, layer in ready.layers.items())
    if plan.size_bytes and size != plan.size_bytes:
        raise QuantkitError(
            f"The plan promised {plan.size_bytes:,} bytes of weights, {size:,} were packed. Please report this."
        )
    return replace(
        plan,
        schemes={name: plan.schemes.get(name, Scheme()) for name in ready.layers},
        sites={name: _found_format(simulated.ranges.get(name), fmt) for name, fmt in formats.items()},
        size_bytes=size,
        total_bytes=size + ready.other_bytes,
        average_bits=average_bits(ready.layers, size),
        provenance={"first_last": {"policy": AS_GIVEN, **ends_of(ready.trace)}} | plan.provenance,
    )


def _found_format(found: AnyRange | None, asked: ActivationFormat) -> str:
    """The format a site got: probabilities may have got logarithmic codes."""
    return str(asked if found is None else found.format)


def compare_outputs(
    model: nn.Module, batches: Sequence[Batch], reference: Sequence[Tensor], loss: str
) -> dict[str, float]:
    """Damage and agreement of the largest output with the float model's outputs ``reference`` on the calibration
    inputs; nothing without any.
    """
    if not batches:
        return {}
    damage = damage_for(loss, torch.cat(list(reference)))
    after = list(Subject(model, batches, {}).outputs())
    losses = torch.cat([damage.rows(a, b) for a, b in zip(reference, after, strict=True)])
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(reference, after, strict=True)])
    return {"calibration_damage": float(losses.mean()), "calibration_agreement": float(same.float().mean())}
