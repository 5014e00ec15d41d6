"""Scaling of channels: factors that a model lets through are chosen so that what is quantized of it is even.

Behind a norm, a value projection, a gated product or a convolution, channel j is multiplied by f_j, and the columns of
the layers that read it are divided by it:

    f_j = max|W_j|^(1 - a) / max|X_j|^a         activations are quantized (SmoothQuant, arXiv 2211.10438, equation 4)
    f_j = 1 / mean|X_j|^a                       weights alone (AWQ, arXiv 2306.00978, equation 5)

with the strength a, of a few, whose error behind the layers is least with activations and weights quantized. With
a = 1/2 between two convolutions it is cross-layer equalization (Nagel et al., arXiv 1906.04721). Queries and keys are
scaled against each other, pairs that a rotation mixes alike (FireQ's pre-RoPE scaling): f_j = (q_j / k_j)^(1 - a) for
the largest norms q_j and k_j of what has one factor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantkit.formats import ActivationFormat
from quantkit.numbers.kinds import token_range
from quantkit.program.layers import Weights
from quantkit.ranges.activations import RANGES, Extremes, Histogram
from quantkit.rounding.weights import quantize_weight
from quantkit.targets.roles import KEY, QUERY
from quantkit.transforms.channel_groups import Group, Member, columns_of, groups_of, holds_half, scale
from quantkit.transforms.channel_labels import COLUMNS, GAIN
from quantkit.transforms.channel_statistics import Seen, channel_axis, seen_of
from quantkit.transforms.registry import TRANSFORMS, Proposal, Setting, Transform, recorded

NORMS, LAYERS, KEYS = "norm-scaling", "layer-scaling", "key-scaling"
STRENGTHS = tuple(i / 4 for i in range(5))
LARGEST, MEAN = "largest", "mean"
BALANCED = 0.5
OUTPUTS = 64  # of each layer that errors are measured at
BETTER = 0.98  # of the error without it is where a scaling begins


@dataclass(frozen=True, eq=False)
class ChannelScaling:
    """The factors of a group, float64; the strength that they were made with, and ``by`` what of the values: the
    "largest" magnitude or the "mean" one.
    """

    transform: str
    group: Group
    factors: Tensor
    strength: float
    by: str

    def apply(self, weights: Weights) -> None:
        scale(weights, self.group, self.factors)

    def record(self) -> dict[str, Any]:
        return {"transform": self.transform, "at": self.group.name, "strength": self.strength, "by": self.by}


def kind_of(group: Group) -> str:
    """The transform that a group belongs to."""
    if not group.of_kind(COLUMNS):
        return KEYS
    return NORMS if group.of_kind(GAIN) else LAYERS


def _propose(transform: str, setting: Setting) -> Proposal:
    groups, reasons = groups_of(setting.ready)
    own = [group for group in groups if kind_of(group) == transform and _is_quantized(setting, group)]
    changes = []
    for group, seen in seen_of(setting, own):
        by = _statistic(setting, group)
        strength = BALANCED if transform == KEYS else _best_strength(setting, group, seen, by)
        if strength is not None:
            changes.append(_change(setting, group, seen, (strength, by)))
    return Proposal(tuple(changes), reasons)


def _redo(transform: str, setting: Setting, records: Sequence[Mapping[str, Any]]) -> tuple[ChannelScaling, ...]:
    made_with = {str(record["at"]): (float(record["strength"]), str(record["by"])) for record in records}
    known = {group.name: group for group in groups_of(setting.ready)[0] if kind_of(group) == transform}
    own = recorded(records, known, f"scales channels ({transform}) at")
    return tuple(_change(setting, group, seen, made_with[group.name]) for group, seen in seen_of(setting, own))


def _is_quantized(setting: Setting, group: Group) -> bool:
    """Whether something that a group's factors make even gets codes."""
    if group.of_kind(COLUMNS):
        return any(member.name in setting.weights for member in group.of_kind(COLUMNS))
    return any(site.name in setting.sites and {QUERY, KEY} & set(site.roles) for site in setting.ready.sites)


def _statistic(setting: Setting, group: Group) -> str:
    """What factors go by: the mean magnitude where no layer that reads the values quantizes them."""
    readers = group.of_kind(COLUMNS)
    return LARGEST if not readers or any(_format(setting, member) for member in readers) else MEAN


def _change(setting: Setting, group: Group, seen: Seen, made_with: tuple[float, str]) -> ChannelScaling:
    factors = _factors(setting, group, seen, *made_with)
    if holds_half(setting.ready.weights, group):
        factors = torch.exp2(factors.log2().round())
    return ChannelScaling(kind_of(group), group, factors, *made_with)


def _factors(setting: Setting, group: Group, seen: Seen, strength: float, by: str) -> Tensor:
    """The factors of a strength, with a geometric mean of one; that of a channel without values is one."""
    if not group.of_kind(COLUMNS):
        return _normalized({seen.inverse: 1 - strength, seen.made: strength - 1})
    if by == MEAN:
        return _normalized({seen.mean: -strength})
    return _normalized({_largest_weights(setting.ready.weights, group): 1 - strength, seen.made: -strength})


def _normalized(powers: Mapping[Tensor, float]) -> Tensor:
    """The product of magnitudes, each to a power."""
    live = torch.stack([(magnitude > 0) & magnitude.isfinite() for magnitude in powers]).all(0)
    logs = torch.zeros(len(live), dtype=torch.float64, device="cpu")
    for magnitude, power in powers.items():
        logs[live] += power * magnitude[live].log()
    if live.any():
        logs[live] -= logs[live].mean()
    return logs.exp()


def _largest_weights(weights: Weights, group: Group) -> Tensor:
    """The largest magnitude in each factor's columns of all layers that read it."""
    largest = torch.zeros(group.size, dtype=torch.float64, device="cpu")
    for member in group.of_kind(COLUMNS):
        weight, groups = weights[member.name].detach().cpu().double(), weights.layers[member.name].groups
        each = weight.abs().reshape(groups, weight.shape[0] // groups, weight.shape[1], -1).amax((1, 3)).reshape(-1)
        own = member.channel >= 0
        largest.scatter_reduce_(0, member.channel[own], each[own], "amax")
    return largest


def _format(setting: Setting, member: Member) -> ActivationFormat | None:
    """The format of what a layer reads; None where that stays float."""
    formats = (setting.sites.get(name) for name in setting.ready.layers[member.name].inputs)
    return next((found for found in formats if found is not None), None)


def _best_strength(setting: Setting, group: Group, seen: Seen, by: str) -> float | None:
    """The strength with the least error behind the layers that read a group; None where no scaling errs less."""
    readers = [m for m in group.of_kind(COLUMNS) if m.name in setting.weights and m.name in seen.inputs]
    plain = _error(setting, readers, seen, torch.ones(group.size, dtype=torch.float64, device="cpu"))
    errors = {a: _error(setting, readers, seen, _factors(setting, group, seen, a, by)) for a in STRENGTHS}
    best = min(errors, key=errors.__getitem__)
    return best if errors[best] < BETTER * plain else None


@torch.no_grad()
def _error(setting: Setting, readers: Sequence[Member], seen: Seen, factors: Tensor) -> float:
    """Squared error of what layers make of their quantized inputs and weights, as shares of what they make."""
    weights, total = setting.ready.weights, 0.0
    for member in readers:
        x, own = seen.inputs[member.name], member.spread(factors).float()
        axis = channel_axis(setting.ready.program, member)
        scaled = x * own.reshape(-1, *[1] * (-1 - axis))
        if (format := _format(setting, member)) is not None:
            scaled = _quantized(scaled, format)
        layer, asked = weights.layers[member.name], setting.weights[member.name]
        weight = weights[member.name].detach()
        if layer.groups == 1:
            weight = weight[:: max(1, len(weight) // OUTPUTS)]
        weight = weight.cpu().float()
        columns = columns_of(own, weight, layer.groups)
        rounded = quantize_weight(weight / columns, [asked], groups=layer.groups, rounding="nearest").weights[asked]
        product = _product_of(setting, member.name)
        wanted = product(x, weight)
        error = product(scaled, rounded.dequantize().float()) - wanted
        total += float(error.square().sum() / wanted.square().sum().clamp(min=1e-30))
    return total


def _quantized(x: Tensor, format: ActivationFormat) -> Tensor:
    if format.dynamic:
        return token_range(format).fake_quantize(x)
    return RANGES["mse"](Histogram.empty(Extremes().seen(x)).seen(x), format.bits).fake_quantize(x)


def _product_of(setting: Setting, name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """What a layer makes of an input and a weight, output channels first, without its bias."""
    program = setting.ready.program
    if len(program.weights[name].shape) == 2:
        return lambda x, weight: x @ weight.T
    call = program.calls[name][0]
    step = next(step for step in program.steps if step.key == call.key)

    def convolved(x: Tensor, weight: Tensor) -> Tensor:
        values = dict(zip(step.inputs, (x, weight, torch.zeros_like(weight[:, 0].flatten(1)[:, 0])), strict=False))
        args, kwargs = step.called(values, program.shape)
        made: Tensor = step.func(*args, **kwargs)
        return made

    return convolved


for _name in (NORMS, LAYERS, KEYS):
    TRANSFORMS[_name] = Transform(partial(_propose, _name), partial(_redo, _name))
