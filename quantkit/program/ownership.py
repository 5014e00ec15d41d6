"""Who owns every number that a model stores: a layer that can be quantized, a weight that stays float for a reason, or
neither, as biases, norms and buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantkit.program.halves import VIEWS
from quantkit.program.layers import LayerWeight
from quantkit.program.program import Program, Step
from quantkit.program.updates import named_state

LAYER, FLOAT, OTHER = "layer", "float", "other"
CONSTANT = "it reads a constant, not an activation"
UNREAD = "no recorded call reads its weight, so that a file does not hold it"
_COPIES = VIEWS | frozenset(
    "index_select to float double half bfloat16 type type_as clone repeat repeat_interleave tile flip "
    "interpolate".split()  # a table of positions, resized to the image at hand
)
_UNARY = frozenset("clamp exp log sigmoid tanh softplus abs sqrt rsqrt pow neg reciprocal".split())
ELEMENTWISE = frozenset(
    "add sub rsub mul div where maximum minimum masked_fill lerp addcmul cat stack "
    "layer_norm rms_norm group_norm batch_norm instance_norm prelu".split()  # each scales by its weight
)


@dataclass(frozen=True)
class Owned:
    """A parameter or buffer, or a part of one: how many elements and bytes, and its ``owner``: a quantizable "layer",
    "float", a weight that is not, for a ``reason``, or "other". ``layer`` names the layer, quantizable or not.
    """

    name: str
    elements: int
    bytes: int
    owner: str
    layer: str = ""
    reason: str = ""


def ownership(model: nn.Module, program: Program, reasons: Mapping[str, str] | None = None) -> list[Owned]:
    """Everything that ``model`` stores, tied tensors once. ``reasons`` say of layers why they stay float."""
    stored, first = _stored(model)
    claims = _claims(program, stored, first)
    reasons = {name: reason for name, reason in (reasons or {}).items() if reason}
    if program.steps:
        uncalled = [name for name in program.weights if name not in program.calls]
        reasons = {name: why_uncalled(program, program.weights[name]) for name in uncalled} | reasons
    parameters = {first.get(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    found = []
    for name, tensor in stored.items():
        size, left = tensor.element_size(), tensor.numel()
        for layer, elements in _parts(tensor, claims.get(name, [])):
            left -= elements
            reason = reasons.get(layer, "")
            found.append(Owned(name, elements, elements * size, FLOAT if reason else LAYER, layer, reason))
        if left:
            weight = name in parameters and tensor.dim() > 1 and tensor.is_floating_point()
            reason = why_in_no_layer(program, name) if weight else ""
            found.append(Owned(name, left, left * size, FLOAT if weight else OTHER, "", reason))
    return found


def _stored(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All parameters and buffers, of those in the same memory the largest; and by each name the one that counts."""
    largest: dict[object, str] = {}
    tensors = {name: tensor for name, tensor in named_state(model).items() if tensor.numel()}
    place = {name: x.data_ptr() or id(x) for name, x in tensors.items()}
    for name, tensor in tensors.items():
        known = largest.setdefault(place[name], name)
        if tensor.numel() > tensors[known].numel():
            largest[place[name]] = name
    first = {name: largest[place[name]] for name in tensors}
    return {name: tensor for name, tensor in tensors.items() if first[name] == name}, first


def _claims(
    program: Program, stored: Mapping[str, Tensor], first: Mapping[str, str]
) -> dict[str, list[tuple[str, LayerWeight]]]:
    """Parameter -> the layers whose weights are in it, or are computed from it where no other layer is in it."""
    claims: dict[str, list[tuple[str, LayerWeight]]] = {}
    computed = []
    for layer, weight in program.weights.items():
        if weight.parameter is None:
            computed.append((layer, weight))
        else:
            claims.setdefault(first[weight.parameter], []).append((layer, weight))
    for layer, weight in computed:
        for name in {first[source] for source in weight.sources if source in first}:
            if name not in claims and stored[name].dim() > 1 and stored[name].is_floating_point():
                claims[name] = [(layer, weight)]
    return claims


def _parts(tensor: Tensor, layers: list[tuple[str, LayerWeight]]) -> Iterator[tuple[str, int]]:
    """(layer, elements) of the layers in a tensor; an element that several read belongs to the first."""
    free: Tensor | None = None
    for layer, weight in layers:
        if weight.parameter is None or (weight.region is None and free is None):
            yield layer, tensor.numel()
            return
        if free is None:
            free = torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.bool).fill_(True)
        part = free if weight.region is None else weight.region.of(free)
        yield layer, int(part.sum())
        part.fill_(False)


def why_uncalled(program: Program, weight: LayerWeight) -> str:
    """Why a layer's weight is read by none of its calls."""
    found = [] if weight.parameter is None else readers(program, program.stored[weight.parameter])
    if not found:
        return UNREAD
    if all(program.varying.isdisjoint(step.inputs) for step in found):
        return CONSTANT
    return f"its weight is read by {found[0].key}, which is no product"


def why_in_no_layer(program: Program, name: str) -> str:
    """Why a parameter of two or more dimensions, or a part of it, is the weight of no layer."""
    if name not in program.stored or not (found := readers(program, program.stored[name])):
        return UNREAD
    others = [step.key.op for step in found if step.key.op not in ELEMENTWISE]
    return (
        f"it is read by {others[0]}, which is no product"
        if others
        else "it is only added or multiplied element by element"
    )


def readers(program: Program, number: int) -> list[Step]:
    """The steps that read a value, or what moves, copies or scales it, and are no layer's."""
    numbers, readers = {number}, []
    for step in program.steps:
        if numbers.isdisjoint(step.inputs):
            continue
        if step.key.op in _COPIES or step.key.op in _UNARY:
            numbers.update(step.makes)
        elif step.key not in program.layer_of:
            readers.append(step)
    return readers
