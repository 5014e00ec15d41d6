"""A user's model made ready: checked, copied, folded, traced, its layers and sites found. The model itself is
untouched.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from quantkit.errors import InvalidRequest
from quantkit.formats import Scheme
from quantkit.plan import Layer
from quantkit.program.codes import can_hold_codes
from quantkit.program.inputs import Batch, first_samples
from quantkit.program.layers import layer_kind, weight_of
from quantkit.program.sites import Site, place_sites, token_sites
from quantkit.program.trace import Trace, trace, untraced
from quantkit.progress import notice
from quantkit.targets import Target
from quantkit.transforms.fold_bn import fold, foldable_pairs
from quantkit.transforms.plain_weights import copy_with_computed_tensors, make_weights_plain

SITE_BYTES = 5  # a float32 scale and a uint8 zero point
TRACE_SAMPLES = 2
KEPT = "kept float by a rule"


@dataclass(frozen=True)
class Prepared:
    """A float32 copy of the model in eval mode with BatchNorm folded, and what is known about it.

    ``folds`` are the (layer, BatchNorm) pairs that were folded. ``layers`` are in execution order, those never called
    last; each is quantizable or carries the reason why not. ``other_bytes`` is what the model stores besides the
    layers' weights: biases, unfolded norms, buffers, and a scale and zero point per site. ``float_bytes`` is all that
    the user's model stores, ``float32_bytes`` the same in float32.
    """

    model: nn.Module
    trace: Trace
    folds: tuple[tuple[str, str], ...]
    layers: dict[str, Layer]
    sites: tuple[Site, ...]
    other_bytes: int
    float_bytes: int
    float32_bytes: int

    @property
    def quantizable(self) -> list[str]:
        return [name for name, layer in self.layers.items() if not layer.reason]


def prepare(
    model: nn.Module, batches: Sequence[Batch], target: Target, keep_float: Collection[str] = (), inplace: bool = False
) -> Prepared:
    """Check and prepare ``model``; layers named in ``keep_float`` are not quantized.

    Raises InvalidRequest for NaN or infinite weights, parameters without values, compiled code, a batch the model
    rejects, or a model without a quantizable layer.
    """
    own, element_bytes, sizes = _checked_copy(model, inplace)
    example, found = _first_trace(own, batches[0])
    folds = foldable_pairs(own, found)
    fold(own, folds)
    found = trace(own, example)
    layers = _layers(own, found, target, set(keep_float), element_bytes)
    return _placed(Prepared(own, found, tuple(folds), layers, (), 0, *sizes), target)


def prepare_untraced(
    model: nn.Module, target: Target, keep_float: Collection[str] = (), inplace: bool = False
) -> Prepared:
    """``prepare`` where there is nothing to run the model on: layers in the order of its modules, nothing folded, no
    sites. A layer whose weight the model also holds under another name stays float.
    """
    own, element_bytes, sizes = _checked_copy(model, inplace)
    found = untraced(own)
    layers = _layers(own, found, target, set(keep_float), element_bytes)
    return _placed(Prepared(own, found, (), layers, (), 0, *sizes), target)


def with_sites_of(ready: Prepared, schemes: Iterable[Scheme]) -> Prepared:
    """The same with the sites that ``schemes`` need: none for weights alone, and what each layer reads where that is
    quantized as it comes; neither stores any range.
    """
    activations = [scheme.activation for scheme in schemes if scheme.activation is not None]
    if any(not activation.dynamic for activation in activations):
        return ready
    sites = token_sites(ready.trace, ready.quantizable) if activations else ()
    other = ready.other_bytes - SITE_BYTES * len(ready.sites)
    return replace(ready, layers=_with_inputs(ready.layers, sites), sites=sites, other_bytes=other)


def without_sites(ready: Prepared, names: Collection[str]) -> Prepared:
    """The same with the tensors of these sites in float."""
    sites = tuple(site for site in ready.sites if site.name not in names)
    other = ready.other_bytes - SITE_BYTES * (len(ready.sites) - len(sites))
    return replace(ready, layers=_with_inputs(ready.layers, sites), sites=sites, other_bytes=other)


def _checked_copy(model: nn.Module, inplace: bool) -> tuple[nn.Module, dict[str, int], tuple[int, int]]:
    """The model to work on, bytes an element of each parameter in the user's model, and that model's bytes, as it is
    and in float32.
    """
    _require_plain_model(model)
    element_bytes = {name: p.element_size() for name, p in model.named_parameters(remove_duplicate=False)}
    stored = sum(t.numel() * t.element_size() for t in _stored(model))
    in_float32 = sum(t.numel() * (4 if t.is_floating_point() else t.element_size()) for t in _stored(model))
    own = _own_copy(model, inplace)
    _require_finite_weights(own)
    return own, element_bytes, (stored, in_float32)


def leave_float(ready: Prepared, target: Target, names: Collection[str]) -> Prepared:
    """The same model with these layers not quantized either, and the sites that are left. Raises InvalidRequest where
    no quantizable layer is.
    """
    reasons = {name: layer.reason or (KEPT if name in names else "") for name, layer in ready.layers.items()}
    layers = {name: replace(layer, reason=reasons[name]) for name, layer in ready.layers.items()}
    return _placed(replace(ready, layers=layers), target)


def _placed(ready: Prepared, target: Target) -> Prepared:
    """With the sites that its quantizable layers need, and what is stored besides weights."""
    own, layers = ready.model, ready.layers
    names = [name for name, layer in layers.items() if not layer.reason]
    if not names:
        reasons = [f"{n}: {layer.reason}" for n, layer in layers.items()] or ["it has none of the known layers"]
        raise InvalidRequest(f"The model has no layer to quantize ({'; '.join(reasons[:5])}).")
    sites = place_sites(own, ready.trace, target, names) if ready.trace.ops else ()
    stored = sum(t.numel() * t.element_size() for t in _stored(own))
    weights = sum(layer.weights for layer in layers.values()) * 4
    other = stored - weights + SITE_BYTES * len(sites)
    return replace(ready, layers=_with_inputs(layers, sites), sites=sites, other_bytes=other)


def _require_plain_model(model: nn.Module) -> None:
    if layer_kind(model) is not None:
        raise InvalidRequest("The model is a single layer, which has no name: pass torch.nn.Sequential(model).")
    compiled = any(hasattr(module, "_orig_mod") for module in model.modules())
    if compiled or isinstance(model, torch.jit.ScriptModule):
        raise InvalidRequest(
            f"The model went through {'torch.compile' if compiled else 'torch.jit'}, which hides its layers. "
            "Pass the model as it was before; the result can be compiled."
        )
    without = [name for name, p in model.named_parameters() if is_lazy(p) or p.is_meta]
    if without:
        raise InvalidRequest(
            f"These parameters have no values yet: {', '.join(without[:5])}. Run the model on a batch once (lazy "
            "layers) or load its weights (meta device) first."
        )


def _own_copy(model: nn.Module, inplace: bool) -> nn.Module:
    own = model if inplace else _copied(model)
    if own.training:
        notice(f"the model is in training mode: quantizing {'it' if inplace else 'a copy'} in eval mode")
    if any(p.device.type != "cpu" for p in own.parameters()):
        notice(f"the model is not on the CPU: measuring and quantizing {'it' if inplace else 'a copy'} there")
    own = own.cpu().float().eval()
    make_weights_plain(own)
    first: dict[int, str] = {}
    for name, module in own.named_modules():
        if layer_kind(module) is None:
            continue
        weight = weight_of(module, "")
        if id(weight) in first:
            notice(f"{name} shares its weight with {first[id(weight)]}: each gets its own codes")
            module.weight = nn.Parameter(weight.detach().clone())
        first[id(module.weight)] = name
    return own


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy_with_computed_tensors(model)
    except Exception as error:  # whatever the user's classes raise
        raise InvalidRequest(
            f"The model cannot be copied: {type(error).__name__}: {str(error).rstrip(' .')}. "
            "Remove what copy.deepcopy cannot copy, or pass inplace=True."
        ) from error


def _first_trace(model: nn.Module, batch: Batch) -> tuple[Batch, Trace]:
    """A trace on a few samples of the batch, and the inputs used; on all of it where the model does not take fewer (as
    where rows refer to each other) or where the few leave layers out that others reach (as experts).
    """
    example = first_samples(batch, TRACE_SAMPLES)
    try:
        found = trace(model, example)
    except InvalidRequest:
        return batch, trace(model, batch)
    if len(found.calls) == len(found.kinds):
        return example, found
    whole = trace(model, batch)
    return (batch, whole) if len(whole.calls) > len(found.calls) else (example, found)


def _stored(model: nn.Module) -> list[torch.Tensor]:
    """The tensors a deployed model must store: parameters and buffers, without BatchNorm's training counters."""
    buffers = [b for name, b in model.named_buffers() if not name.endswith("num_batches_tracked")]
    return [*model.parameters(), *buffers]


def _require_finite_weights(model: nn.Module) -> None:
    statistics = [(name, b) for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
    bad = [name for name, p in (*model.named_parameters(), *statistics) if not torch.isfinite(p).all()]
    if bad:
        raise InvalidRequest(
            f"These weights contain NaN or infinite values: {', '.join(bad[:5])}. Repair the checkpoint."
        )


def _layers(
    model: nn.Module, found: Trace, target: Target, keep_float: Collection[str], element_bytes: dict[str, int]
) -> dict[str, Layer]:
    position = {op.key: i for i, op in enumerate(found.ops)}
    order = sorted(found.kinds, key=lambda n: position[found.calls[n][0].key] if n in found.calls else len(position))
    layers = {}
    for name in order:
        weight, calls = weight_of(model, name), found.calls.get(name, ())
        layers[name] = Layer(
            name=name,
            kind=found.kinds[name],
            shape=tuple(weight.shape),
            float_bytes=weight.numel() * element_bytes.get(f"{name}.weight", 4),
            macs=sum(call.macs for call in calls),
            calls=len(calls),
            reason=_reason_to_stay_float(name, model, found, target, keep_float),
        )
    return layers


def _reason_to_stay_float(
    name: str, model: nn.Module, found: Trace, target: Target, keep_float: Collection[str]
) -> str:
    if name in keep_float:
        return KEPT
    if found.kinds[name] not in target.layers:
        return f"{found.kinds[name]} is not supported by target {target.name} yet"
    if not found.ops:
        return _held_elsewhere(name, model)
    calls = found.calls.get(name, ())
    own = {call.key for call in calls}
    if others := [op.key for op in found.consumers.get(found.stored[f"{name}.weight"], ()) if op.key not in own]:
        return f"its weight is read by {others[0]}, not only by its own calls"
    if not calls:
        return "its weight takes part in no call of the traced run"
    read = [call.input for call in calls]
    if any(v in found.stored.values() for v in read) or all(
        v in found.makers and v not in found.varying for v in read
    ):
        return "it reads a constant, not an activation"
    if not all(can_hold_codes(found, v) for v in read):
        return "it reads a tensor that no traced call made (scripted code, or writing through a view)"
    return ""


def _held_elsewhere(name: str, model: nn.Module) -> str:
    """Why a layer of a model that was not traced stays float: others may compute with its weight."""
    weight, own = weight_of(model, name), f"{name}.weight" if name else "weight"
    others = [n for n, p in model.named_parameters(remove_duplicate=False) if p is weight and n != own]
    same = [n for n in others if model.get_submodule(n.rpartition(".")[0]) is not model.get_submodule(name)]
    return f"its weight is also {same[0]}, and without example_inputs nobody knows who reads it" if same else ""


def _with_inputs(layers: dict[str, Layer], sites: Sequence[Site]) -> dict[str, Layer]:
    return {
        name: replace(layer, inputs=tuple(site.name for site in sites if name in site.consumers))
        for name, layer in layers.items()
    }
