"""A user's model made ready: checked, copied, folded, traced, its layers and sites found. The model itself is
untouched.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from quantkit.errors import InvalidRequest
from quantkit.formats import Scheme
from quantkit.plan import Layer
from quantkit.program.additions import additions_of_no_use, drowned_additions
from quantkit.program.codes import can_hold_codes
from quantkit.program.float_weights import weights_outside, with_float_weights
from quantkit.program.halves import VIEWS, double_parameters, keep_only_matrices_half, stores_halves
from quantkit.program.inputs import Batch, batch_size, first_samples, picked_samples, pieces
from quantkit.program.intercept import OpKey
from quantkit.program.layers import LayerWeight, Weights
from quantkit.program.optional_inputs import dispensable_inputs
from quantkit.program.ownership import CONSTANT, UNREAD, ownership, why_uncalled
from quantkit.program.padding import Padding, padded_first
from quantkit.program.program import Program, Step
from quantkit.program.record import record, unrecorded
from quantkit.program.replayable import computed_weights
from quantkit.program.sites import Site, place_sites, token_sites
from quantkit.program.trial import explained, require_repeatable, require_samples_first
from quantkit.program.updates import named_state
from quantkit.progress import notice, warn
from quantkit.simulation.model import SimulatedModel, as_float
from quantkit.targets import Target
from quantkit.transforms import stored
from quantkit.transforms.change import Change
from quantkit.transforms.fold_bn import fold, foldable_pairs, without_norms
from quantkit.transforms.half_floats import stored_as_halves
from quantkit.transforms.plain_model import require_plain_model
from quantkit.transforms.plain_weights import copy_with_computed_tensors, make_weights_plain

RECORDED_SAMPLES = 2
KEPT = "kept float by a rule"


@dataclass(frozen=True)
class Prepared:
    """A copy of the model in eval mode with BatchNorm folded, and what is known about it. It stays on its device, and
    matrices in half precision stay that (``program.halves``): what computes with one widens it.

    ``program`` was recorded on ``example``. ``weights`` are those of the layers, ``folds`` are the (layer, BatchNorm)
    pairs that were folded. ``layers`` are in execution order, those never called last; each is quantizable or carries
    the reason why not. ``other_bytes`` is what a file stores besides the layers' weights: biases, unfolded norms,
    buffers, and what codes bring with them (``transforms.stored``). ``float_bytes`` is all that the user's model
    stores, ``float32_bytes`` the same in float32. ``float_sums`` are additions without codes (``program.additions``).
    ``padding`` is that of the calibration inputs; None where there is none. ``half_floats``: what stays float is
    stored as float16, which are the parameters and buffers ``halves`` as far as they have no codes. ``largest_others``
    are the largest of what belongs to no layer, with their bytes. ``changes`` are those that transforms made.
    """

    model: nn.Module
    program: Program
    example: Batch | None
    weights: Weights
    folds: tuple[tuple[str, str], ...]
    layers: dict[str, Layer]
    sites: tuple[Site, ...]
    other_bytes: int
    float_bytes: int
    float32_bytes: int
    float_sums: frozenset[OpKey] = frozenset()
    padding: Padding | None = None
    half_floats: bool = False
    halves: frozenset[str] = frozenset()
    largest_others: Mapping[str, int] = field(default_factory=dict)
    changes: tuple[Change, ...] = ()

    def float_model(self) -> SimulatedModel:
        """The model with nothing quantized, called as the quantized one is."""
        return as_float(self.model, self.weights, self.program.updated)

    @property
    def quantizable(self) -> list[str]:
        return [name for name, layer in self.layers.items() if not layer.reason]


def prepare(model: nn.Module, batches: Sequence[Batch], target: Target) -> Prepared:
    """Check and prepare ``model``. Raises InvalidRequest for NaN or infinite weights, parameters without values,
    compiled code, a batch the model rejects or whose first axis is not its samples, a model that is random, or one
    without a quantizable layer.
    """
    own, element_bytes, sizes = _checked_copy(model)
    batch = padded_first(own, batches)
    try:
        example, program = _first_recording(own, batch)
    except InvalidRequest as error:
        if not stores_halves(own):
            raise explained(own, batch, error, double_parameters(model)) from error
        example, program = _first_recording(own.float(), batch)
        notice("the model computes in half precision where its calls cannot be seen: all of it is float32 here")
    for name, outputs in dispensable_inputs(program, own, example).items():
        notice(
            f"input {name!r} makes nothing but {', '.join(map(repr, outputs))}, as labels make a loss: exported files "
            f"take and return them; leave {name!r} out of the data to have files without them"
        )
    require_repeatable(own, example)
    require_samples_first(own, batch)
    folds = foldable_pairs(own, program)
    fold(own, folds)
    folded = without_norms(program, folds) if folds else program
    program = with_float_weights(record(own, example) if folded is None else folded, own)
    if outside := weights_outside(program, own):
        warn(
            f"weights outside the model's parameters stay float, and no size counts them: {', '.join(outside[:5])}"
            f"{' and others' * (len(outside) > 5)}. Hold layers in modules (nn.ModuleList), and tensors in "
            "nn.Parameter or register_buffer"
        )
    sums = drowned_additions(own, program, target, batch)
    return _prepared(own, program, _Request(target, element_bytes, sizes), example, tuple(folds), sums)


def prepare_own(ready: Prepared, model: nn.Module) -> Prepared:
    """The same on the user's own model, which becomes what the copy was before anything was quantized."""
    own = _in_eval_mode(model, "it")
    if not stores_halves(ready.model):
        own.float()
    fold(own, ready.folds)
    weights = Weights(own, ready.program.weights, computed_weights(own, ready.program))
    for change in ready.changes:
        change.apply(weights)
    return replace(ready, model=own, weights=weights)


@dataclass(frozen=True)
class _Request:
    """What a model is prepared for, bytes an element of each of the user's parameters, and the bytes of the user's
    model, as it is and in float32.
    """

    target: Target
    element_bytes: Mapping[str, int]
    sizes: tuple[int, int]


def _prepared(
    own: nn.Module,
    program: Program,
    request: _Request,
    example: Batch | None = None,
    folds: tuple[tuple[str, str], ...] = (),
    float_sums: frozenset[OpKey] = frozenset(),
) -> Prepared:
    weights = Weights(own, program.weights, computed_weights(own, program))
    layers = _layers(weights, program, request)
    ready = Prepared(own, program, example, weights, folds, layers, (), 0, *request.sizes, float_sums)
    return _placed(ready, request.target)


def prepare_unrecorded(model: nn.Module, target: Target) -> Prepared:
    """``prepare`` where there is nothing to run the model on: layers in the order of its modules, nothing folded, no
    sites. A layer whose weight the model also holds under another name stays float.
    """
    own, element_bytes, sizes = _checked_copy(model)
    return _prepared(own, unrecorded(own), _Request(target, element_bytes, sizes))


def with_sites_of(ready: Prepared, schemes: Iterable[Scheme]) -> Prepared:
    """The same with the sites that ``schemes`` need: none for weights alone, and what each layer reads where that is
    quantized as it comes; neither stores any range.
    """
    activations = [scheme.activation for scheme in schemes if scheme.activation is not None]
    if any(not activation.dynamic for activation in activations):
        return ready
    readers = [name for name in ready.quantizable if not ready.layers[name].weight_only]
    sites = token_sites(ready.program, readers) if activations else ()
    return _with_sites(ready, sites, tokens=True)


def without_sites(ready: Prepared, names: Collection[str]) -> Prepared:
    """The same with the tensors of these sites in float."""
    if not names:
        return ready
    return _with_sites(ready, tuple(site for site in ready.sites if site.name not in names))


def with_half_floats(ready: Prepared) -> Prepared:
    """The same with all that stays float stored as float16."""
    return _with_sites(replace(ready, half_floats=True), ready.sites)


def _checked_copy(model: nn.Module) -> tuple[nn.Module, dict[str, int], tuple[int, int]]:
    """The model to work on, bytes an element of each parameter in the user's model, and that model's bytes, as it is
    and in float32.
    """
    require_plain_model(model)
    element_bytes = {name: p.element_size() for name, p in model.named_parameters(remove_duplicate=False)}
    as_given = sum(t.numel() * t.element_size() for t in _stored(model))
    in_float32 = sum(t.numel() * (4 if t.is_floating_point() else t.element_size()) for t in _stored(model))
    own = _in_eval_mode(_copied(model), "a copy")
    _require_finite_weights(own)
    return own, element_bytes, (as_given, in_float32)


def leave_float(
    ready: Prepared, target: Target, names: Collection[str], reasons: Mapping[str, str] | None = None
) -> Prepared:
    """The same model with these layers not quantized either, by a rule or for one of ``reasons``, and the sites that
    are left. Raises InvalidRequest where no quantizable layer is.
    """
    given = dict.fromkeys(names, KEPT) | dict(reasons or {})
    layers = {n: replace(layer, reason=layer.reason or given.get(n, "")) for n, layer in ready.layers.items()}
    return _placed(replace(ready, layers=layers), target)


def read_in_float(ready: Prepared, target: Target, names: Collection[str]) -> Prepared:
    """The same model with these layers reading floats, whatever becomes of their weights, and the sites that are
    left.
    """
    if not names:
        return ready
    layers = {n: replace(layer, weight_only=layer.weight_only or n in names) for n, layer in ready.layers.items()}
    return _placed(replace(ready, layers=layers), target)


def _placed(ready: Prepared, target: Target) -> Prepared:
    """With the sites that its quantizable layers need, and what is stored besides weights."""
    own, layers = ready.model, ready.layers
    names = [name for name, layer in layers.items() if not layer.reason]
    coded = [name for name in names if not layers[name].weight_only]
    if not names:
        reasons = [f"{n}: {layer.reason}" for n, layer in layers.items()] or ["it has none of the known layers"]
        raise InvalidRequest(f"The model has no layer to quantize ({'; '.join(reasons[:5])}).")
    if not ready.program.steps:
        return _with_sites(ready, ())
    sums = ready.float_sums | additions_of_no_use(ready.program, target, coded, ready.float_sums)
    sites = place_sites(own, ready.program, target, coded, sums)
    return _with_sites(replace(ready, float_sums=sums), sites)


def _with_sites(ready: Prepared, sites: tuple[Site, ...], tokens: bool = False) -> Prepared:
    """With these sites, and what is stored besides weights; ``tokens``: they are quantized row by row."""
    program, layers = ready.program, _with_inputs(ready.layers, sites)
    owned, halves = ownership(ready.model, program), frozenset[str]()
    if ready.half_floats:
        halves = stored_as_halves(ready.weights, program, layers, owned, tokens)
    narrow = {name for name in layers if ready.weights.layers[name].parameter in halves}
    for name in narrow:
        layers[name] = replace(layers[name], float_bytes=stored.HALF_BYTES * layers[name].weights)
    state = named_state(ready.model)
    floats = {name: tensor.element_size() for name, tensor in state.items() if tensor.is_floating_point()}
    widths = {name: max(size, stored.FLOAT_BYTES) for name, size in floats.items()}
    other = stored.floats_of(owned, widths | dict.fromkeys(halves, stored.HALF_BYTES))
    other += stored.widened({name: layer for name, layer in layers.items() if name not in narrow})
    other += stored.of_sites(program, layers, sites, tokens) + stored.of_constants(program)
    other += stored.of_layouts(program, layers)
    return replace(
        ready, layers=layers, sites=sites, other_bytes=other, halves=halves, largest_others=stored.largest(owned)
    )


def _in_eval_mode(model: nn.Module, called: str) -> nn.Module:
    if model.training:
        notice(f"the model is in training mode: quantizing {called} in eval mode")
    model.eval()
    keep_only_matrices_half(model)
    make_weights_plain(model)
    return model


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy_with_computed_tensors(model)
    except Exception as error:  # whatever the user's classes raise
        raise InvalidRequest(
            f"The model cannot be copied: {type(error).__name__}: {str(error).rstrip(' .')}. "
            "Remove what copy.deepcopy cannot copy."
        ) from error


def _first_recording(model: nn.Module, batch: Batch) -> tuple[Batch, Program]:
    """A recording on a few samples of the batch, and the inputs used; on all of it where the model does not take fewer
    (as where rows refer to each other) or where the few leave layers out that others reach (as experts). A single
    sample is taken twice: what is expanded or broadcast to one sample cannot be told from what is not.
    """
    alone = batch_size(batch) == 1
    example = (
        picked_samples(batch, torch.tensor([0, 0], device="cpu")) if alone else first_samples(batch, RECORDED_SAMPLES)
    )
    try:
        program = record(model, example)
    except InvalidRequest:
        return batch, record(model, batch)
    if len(program.calls) == len(program.kinds):
        return example, program
    whole = record(model, batch)
    return (batch, whole) if len(whole.calls) > len(program.calls) else (example, program)


def _stored(model: nn.Module) -> list[torch.Tensor]:
    """The tensors a deployed model must store: parameters and buffers, without BatchNorm's training counters."""
    buffers = [b for name, b in model.named_buffers() if not name.endswith(stored.TRAINING)]
    return [*model.parameters(), *buffers]


def _require_finite_weights(model: nn.Module) -> None:
    statistics = [(name, b) for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
    named = (*model.named_parameters(), *statistics)
    bad = [name for name, p in named if not all(torch.isfinite(part).all() for part in pieces(p.detach()))]
    if bad:
        raise InvalidRequest(
            f"These weights contain NaN or infinite values: {', '.join(bad[:5])}. Repair the checkpoint."
        )


def _layers(weights: Weights, program: Program, request: _Request) -> dict[str, Layer]:
    position = {step.key: i for i, step in enumerate(program.steps)}
    last = len(position)
    order = sorted(program.kinds, key=lambda n: position[program.calls[n][0].key] if n in program.calls else last)
    layers = {}
    for name in order:
        weight, calls = weights.layers[name], program.calls.get(name, ())
        element = request.element_bytes.get(str(weight.parameter or weight.sources[0]), 4)
        reason = _reason_to_stay_float(name, weights, program, request)
        unread = reason == UNREAD
        layers[name] = Layer(
            name=name,
            kind=weight.kind,
            shape=weight.shape,
            float_bytes=0 if unread else math.prod(weight.shape) * element,
            macs=sum(call.macs for call in calls),
            calls=len(calls),
            reason=reason,
            weight_only=weight.kind not in request.target.layers or not weight.reads_rows,
            unread=unread,
        )
    return layers


def _reason_to_stay_float(name: str, weights: Weights, program: Program, request: _Request) -> str:
    weight, target = weights.layers[name], request.target
    if weight.kind not in (*target.layers, *target.weight_only_layers):
        return f"{weight.kind} is not supported by target {target.name} yet"
    if not program.steps:
        return _held_elsewhere(name, weights)
    calls = program.calls.get(name, ())
    if not calls:
        return why_uncalled(program, weight)
    if others := _other_readers(weight, program):
        alone = all(step.key.op == weight.kind for step in others)
        return CONSTANT if alone else f"its weight is read by {others[0].key}, which is no product"
    read = [call.input for call in calls]
    if not weight.reads_rows:
        return ""
    if any(v in program.stored.values() for v in read):
        return CONSTANT
    if not all(can_hold_codes(program, v) for v in read):
        return "it reads a tensor that no recorded call made (scripted code, or writing through a view)"
    return ""


def _other_readers(weight: LayerWeight, program: Program) -> list[Step]:
    """The calls that read a layer's parameter as it is and are none of its own, nor of another layer in it."""
    if weight.parameter is None or weight.region is not None:
        return []
    readers = program.consumers.get(program.stored[weight.parameter], ())
    return [step for step in readers if step.key not in program.layer_of and step.key.op not in VIEWS]


def _held_elsewhere(name: str, weights: Weights) -> str:
    """Why a layer of a model that was not recorded stays float: others may compute with its weight."""
    model, layer = weights.model, weights.layers[name]
    own = str(layer.parameter)
    weight = weights.tensor(own)
    others = [n for n, p in model.named_parameters(remove_duplicate=False) if p is weight and n != own]
    module = model.get_submodule(own.rpartition(".")[0])
    same = [n for n in others if model.get_submodule(n.rpartition(".")[0]) is not module]
    return f"its weight is also {same[0]}, and without example_inputs nobody knows who reads it" if same else ""


def _with_inputs(layers: dict[str, Layer], sites: Sequence[Site]) -> dict[str, Layer]:
    return {
        name: replace(layer, inputs=tuple(site.name for site in sites if name in site.consumers))
        for name, layer in layers.items()
    }
