"""profile -> allocate -> apply -> compare: the only place that knows the order of the stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.allocation.allocate import allocate
from quantkit.budget import Budget
from quantkit.errors import InvalidRequest, QuantkitError, did_you_mean
from quantkit.formats import Scheme, check_group
from quantkit.graph.batches import Batch, batch_size, digest_batches, digest_model, read_batches, split_batches
from quantkit.kernels.packing import packed_weight_bytes
from quantkit.plan import Plan, Profile, SiteRecord, average_bits, digest_of
from quantkit.progress import notice
from quantkit.quantizers.activation_ranges import RANGES
from quantkit.quantizers.sequence import round_biases, round_in_sequence
from quantkit.quantizers.simulate import SimulatedModel
from quantkit.quantizers.statistics import site_histograms
from quantkit.quantizers.weights import ROUNDINGS
from quantkit.sensitivity import ESTIMATORS
from quantkit.sensitivity.inputs import mixed_pairs
from quantkit.sensitivity.measure import Subject, damage_for
from quantkit.sensitivity.perturbations import site_perturbations, weight_perturbations
from quantkit.store import require_writable
from quantkit.targets import Target
from quantkit.targets.rules import Rules, candidate_schemes, parse_schemes
from quantkit.transforms.prepare import Prepared, prepare

BATCH = 128
DEFAULT_TARGET = "onnxruntime-cpu"
Schemes = Iterable[str | Scheme]


@dataclass
class Result:
    """A quantized model, the decision behind it and what was measured on it.

    ``model`` runs like the original. ``metrics`` compares it with the float model: on the calibration inputs, and on
    the user's own metric where ``evaluate`` was given.
    """

    model: SimulatedModel
    plan: Plan
    prepared: Prepared
    example: Batch
    profile: Profile | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def save(self, folder: str | Path) -> Path:
        """Write plan.json and weights.safetensors into ``folder``; ``quantkit.load`` reads them back."""
        from quantkit.export.save_load import save_result

        return save_result(self.model, self.plan, self.prepared.folds, folder)

    def export_onnx(self, path: str | Path, **options: Any) -> Any:
        """Write an ONNX file for onnxruntime, compared with ``model`` before the call returns (see
        export.onnx_writer).
        """
        from quantkit.export.onnx_writer import export_onnx

        return export_onnx(self.model, self.example, path, **options)


def _choice(name: str, value: str, known: Sequence[str] | Mapping[str, Any]) -> None:
    if value not in known:
        raise InvalidRequest(f"Unknown {name} {value!r}; known: {', '.join(known)}.{did_you_mean(value, list(known))}")


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
    inplace: bool = False,
) -> Profile:
    """Measure what each format of each layer and site costs, alone and in pairs.

    ``calibration``: any iterable of model inputs (tensor, tuple or dict items), labels not needed; ``samples`` caps
    it. ``schemes``: candidate schemes, default the target's. ``rules``: ordered (pattern, scheme or schemes), a later
    one wins. ``loss``: "kl", "mse" or "auto". With ``workdir`` the profile is kept there under a key of everything it
    depends on and reused when nothing changed. Raises InvalidRequest before any measuring when the request cannot be
    carried out.
    """
    goal = Target.load(target)
    for name, value, known in (
        ("sensitivity", sensitivity, ESTIMATORS),
        ("rounding", rounding, ROUNDINGS),
        ("ranges", ranges, RANGES),
    ):
        _choice(name, value, known)
    parse_schemes(schemes, goal)
    if workdir is not None:
        require_writable(workdir)
    batches = split_batches(read_batches(model, calibration, samples), BATCH)
    settings = {
        "schemes": [str(s) for s in parse_schemes(schemes, goal)],
        "rules": repr(rules), "loss": loss, "target": goal.name, "sensitivity": sensitivity, "rounding": rounding,
        "ranges": ranges, "seed": seed, "model": digest_model(model), "calibration": digest_batches(batches),
    }  # fmt: skip
    kept = None if workdir is None else Path(workdir) / f"profile-{digest_of(settings)}.safetensors"
    if kept is not None and kept.exists():
        notice(f"reusing the profile {kept}")
        return Profile.load(kept)
    measured = _measure_profile(model, batches, goal, schemes, rules, settings, progress, inplace)
    if kept is not None:
        measured.save(kept)
    return measured


def _measure_profile(
    model: nn.Module, batches: list[Batch], target: Target, schemes: Any, rules: Any, settings: dict[str, Any],
    progress: bool, inplace: bool,
) -> Profile:  # fmt: skip
    ready = prepare(model, batches, target, inplace=inplace)
    allowed = candidate_schemes({n: ready.layers[n].shape for n in ready.quantizable}, schemes, rules, target)
    always_float = [n for n, options in allowed.items() if all(s.is_float for s in options)]
    if always_float:
        ready = prepare(model, batches, target, always_float, inplace)
    candidates = {n: allowed[n] for n in ready.quantizable}
    site_formats = {s.activation for options in candidates.values() for s in options if s.activation is not None}
    perturbations, rounded = weight_perturbations(ready, candidates, batches, settings["rounding"], progress)
    perturbations += site_perturbations(ready, site_formats, batches, settings["ranges"], progress)
    inputs = mixed_pairs(batches, torch.Generator().manual_seed(settings["seed"]))
    notice(
        "measuring on pair-mixed calibration inputs" if inputs else "measuring on the calibration inputs as they are"
    )
    subject = Subject(ready.model, inputs or batches, {s.name: s for s in ready.sites}, settings["loss"])
    damage = damage_for(subject.loss, next(subject.outputs()))
    notice(f"damage is the {damage.name}")
    scores = ESTIMATORS[settings["sensitivity"]](subject, perturbations, progress)
    sites = {s.name: SiteRecord(s.name, int(torch.Size(s.shape).numel()), s.consumers) for s in ready.sites}
    provenance = settings | {
        "inputs": "pair-mixed" if inputs else "plain",
        "damage": damage.name,
        "samples": sum(batch_size(b) for b in batches),
        "rounded": rounded,
    }
    return Profile(
        layers=ready.layers,
        sites=sites,
        schemes=tuple(settings["schemes"]),
        entries=tuple((p.owner, p.format) for p in perturbations),
        damage=scores.damage,
        gram=scores.gram if scores.gram is not None else 2 * torch.diag(torch.from_numpy(scores.damage)).numpy(),
        other_bytes=ready.other_bytes,
        float_bytes=ready.float_bytes,
        target=target.name,
        candidates={n: tuple(str(s) for s in options) for n, options in candidates.items()},
        provenance=provenance,
    )


def apply(
    model: nn.Module,
    plan: Plan | Mapping[str, str | Scheme],
    calibration: Any,
    *,
    samples: int | None = None,
    target: str | Target = DEFAULT_TARGET,
    rounding: str = "auto",
    ranges: str = "mse",
    loss: str = "auto",
    evaluate: Callable[[nn.Module], float] | None = None,
    progress: bool = True,
    inplace: bool = False,
) -> Result:
    """Quantize ``model`` by ``plan`` (a Plan, or a mapping layer name -> scheme; layers not named stay float).

    Layers are rounded one after the other, each on the inputs it gets from the network quantized so far.
    """
    goal, decided = Target.load(target), Plan.of(plan)
    for name, value, known in (("rounding", rounding, ROUNDINGS), ("ranges", ranges, RANGES)):
        _choice(name, value, known)
    _check_schemes(model, decided, goal)
    batches = split_batches(read_batches(model, calibration, samples), BATCH)
    quantized = [name for name, scheme in decided.schemes.items() if not scheme.is_float]
    every_layer = prepare(model, batches[:1], goal)
    _check_layers(decided, every_layer)
    metrics = {} if evaluate is None else {"float": float(evaluate(model))}
    ready = prepare(model, batches, goal, [n for n in every_layer.layers if n not in quantized], inplace)
    reference = list(Subject(ready.model, batches, {}).outputs())
    histograms = site_histograms(ready.model, ready.sites, batches, progress)
    formats = _site_formats(decided, ready)
    site_ranges = {n: RANGES[ranges](h, Scheme.parse(formats[n]).activation.bits) for n, h in histograms.items()}
    simulated = SimulatedModel(ready.model, ready.sites, {}, site_ranges)
    weight_formats = {name: decided.schemes[name].weight for name in ready.quantizable}
    round_in_sequence(simulated, ready.trace, weight_formats, batches, rounding, progress)
    round_biases(simulated, {name: ready.layers[name].inputs for name in weight_formats})
    final = _recounted(decided, simulated, ready, formats)
    metrics |= _compare(simulated, batches, reference, loss)
    if evaluate is not None:
        metrics["quantized"] = float(evaluate(simulated))
    return Result(simulated, final, ready, batches[0], metrics=metrics)


def _check_schemes(model: nn.Module, plan: Plan, target: Target) -> None:
    known = [name for name, _ in model.named_modules() if name]
    for name, scheme in plan.schemes.items():
        if name not in known:
            raise InvalidRequest(
                f"The plan names layer {name!r}, which the model does not have.{did_you_mean(name, known)}"
            )
        if reason := target.refusal(scheme):
            raise InvalidRequest(f"The plan gives layer {name!r} {scheme}: {reason}.")
    if all(scheme.is_float for scheme in plan.schemes.values()):
        raise InvalidRequest("The plan quantizes no layer: every scheme in it is 'float'.")


def _check_layers(plan: Plan, every: Prepared) -> None:
    for name, scheme in plan.schemes.items():
        if name not in every.layers:
            raise InvalidRequest(
                f"{name!r} in the plan owns no weight to quantize.{did_you_mean(name, list(every.layers))}"
            )
        if not scheme.is_float and every.layers[name].reason:
            raise InvalidRequest(f"The plan gives layer {name!r} {scheme}, but {every.layers[name].reason}.")
        if scheme.weight is not None:
            check_group(name, scheme.weight, every.layers[name].shape)


def _site_formats(plan: Plan, ready: Prepared) -> dict[str, str]:
    """The format of each site: the plan's, else that of the layers reading it, else the widest the plan uses."""
    used = [s.activation for s in plan.schemes.values() if s.activation is not None]
    widest = max(used, key=lambda a: a.bits)
    formats = {}
    for site in ready.sites:
        read = [plan.schemes[c].activation for c in site.consumers if plan.schemes[c].activation is not None]
        formats[site.name] = plan.sites.get(site.name, str(read[0] if read else widest))
    return formats


def _recounted(plan: Plan, simulated: SimulatedModel, ready: Prepared, formats: Mapping[str, str]) -> Plan:
    """The plan with sizes counted from what was packed; raises QuantkitError if they are not what the plan
    promised.
    """
    packed = {name: packed_weight_bytes(weight) for name, weight in simulated.weights.items()}
    size = sum(packed.get(name, layer.float_bytes) for name, layer in ready.layers.items())
    if plan.size_bytes and size != plan.size_bytes:
        raise QuantkitError(
            f"The plan promised {plan.size_bytes} bytes of weights, {size} were packed. Please report this."
        )
    schemes = {name: plan.schemes.get(name, Scheme()) for name in ready.layers}
    bits = average_bits(ready.layers, size)
    return replace(
        plan,
        schemes=schemes,
        sites=dict(formats),
        size_bytes=size,
        total_bytes=size + ready.other_bytes,
        average_bits=bits,
    )


def _compare(model: nn.Module, batches: Sequence[Batch], reference: Sequence[Tensor], loss: str) -> dict[str, float]:
    """Damage and agreement of the largest output with the float model, on the calibration inputs."""
    damage = damage_for(loss, reference[0])
    after = list(Subject(model, batches, {}).outputs())
    losses = torch.cat([damage.rows(a, b) for a, b in zip(reference, after, strict=True)])
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(reference, after, strict=True)])
    return {"calibration_damage": float(losses.mean()), "calibration_agreement": float(same.float().mean())}


def quantize(
    model: nn.Module,
    budget: str | Budget | Mapping[str, Any],
    calibration: Any,
    *,
    schemes: Schemes | None = None,
    samples: int | None = None,
    loss: str = "auto",
    evaluate: Callable[[nn.Module], float] | None = None,
    target: str | Target = DEFAULT_TARGET,
    rules: Rules | None = None,
    sensitivity: str = "gram",
    solver: str = "auto",
    rounding: str = "auto",
    ranges: str = "mse",
    seed: int = 0,
    progress: bool = True,
    workdir: str | Path | None = None,
) -> Result:
    """The best model inside ``budget``: profile, allocate, apply, and a measured comparison with the float model.

    See ``profile`` for the arguments; ``evaluate`` (model -> float, higher is better) is only reported, and must not
    use the calibration data. Raises InvalidRequest for a bad request and InfeasibleBudget when no plan fits.
    """
    limit = Budget.parse(budget)
    items = [kwargs or args for args, kwargs in read_batches(model, calibration, samples)]
    if evaluate is calibration:
        raise InvalidRequest(
            "evaluate and calibration are the same object: choose by calibration data, report on other data."
        )
    measured = profile(
        model, items, schemes=schemes, loss=loss, target=target, rules=rules, sensitivity=sensitivity,
        rounding=rounding, ranges=ranges, seed=seed, progress=progress, workdir=workdir,
    )  # fmt: skip
    plan = allocate(measured, limit, solver=solver, seed=seed)
    result = apply(
        model, plan, items, target=target, rounding=rounding, ranges=ranges, loss=loss, evaluate=evaluate,
        progress=progress,
    )  # fmt: skip
    result.profile = measured
    return result
