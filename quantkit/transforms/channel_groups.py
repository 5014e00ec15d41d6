"""The factors that can be chosen freely, in groups that the same layers and norms take up."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from quantkit.program.halves import is_half
from quantkit.program.layers import Weights
from quantkit.transforms.channel_flow import channel_flow
from quantkit.transforms.channel_labels import COLUMNS, GAIN, ROWS, Flow, Vector
from quantkit.transforms.norms import Normalization, normalizations
from quantkit.transforms.prepare import Prepared


@dataclass(frozen=True, eq=False)
class Member:
    """Where factors of a group go: ``channel`` is for each element of a vector the number of its factor, -1 for none;
    ``inverse`` where it is the factor's inverse that what the vector stands for is multiplied by.
    """

    kind: str
    name: str
    channel: Tensor
    inverse: bool
    norm: Normalization | None = None

    def spread(self, factors: Tensor) -> Tensor:
        """What each element of the vector is multiplied by, given the group's factors."""
        picked = factors[self.channel.clamp(min=0)]
        return torch.where(self.channel < 0, torch.ones_like(picked), 1 / picked if self.inverse else picked)


@dataclass(frozen=True, eq=False)
class Group:
    """``size`` factors, and the members that take them up: a value is multiplied by them where it is made, and layers
    that read it divide their columns by them.
    """

    name: str
    size: int
    members: tuple[Member, ...]

    def of_kind(self, kind: str) -> list[Member]:
        return [member for member in self.members if member.kind == kind]


def groups_of(ready: Prepared) -> tuple[list[Group], dict[str, str]]:
    """The groups of a model in execution order; for norms, and layers that no group makes larger, why not."""
    norms, reasons = normalizations(ready)
    flow = channel_flow(ready.program, norms)
    groups = _named(_groups(flow))
    made = {member.name for group in groups for member in group.members if member.kind != COLUMNS}
    others = {name: why for (kind, name), why in _all_reasons(flow).items() if kind != COLUMNS and name not in made}
    return groups, reasons | others


def _all_reasons(flow: Flow) -> dict[tuple[str, str], str]:
    """The reasons of vectors, also of those whose factors equal others' that are one."""
    starts = torch.tensor([vector.first for vector in flow.vectors], dtype=torch.long, device="cpu")
    pairs = flow.equal[(flow.equal != 0).all(1)].abs()
    tied = (torch.bucketize(pairs, starts, right=True) - 1).unique(dim=0).tolist()
    keys, found = [(vector.kind, vector.name) for vector in flow.vectors], dict(flow.reasons)
    count = -1
    while count != len(found):
        count = len(found)
        for one, other in tied:
            for known, new in ((keys[one], keys[other]), (keys[other], keys[one])):
                if known in found:
                    found.setdefault(new, found[known])
    return found


def _classes(flow: Flow) -> tuple[np.ndarray, np.ndarray]:
    """For each label, the number of its class of equal factors, -1 where that is one; and whether it is the inverse.

    A label and its negative are two nodes of a graph, which are connected where the factor is its own inverse.
    """
    count = 1 + max((vector.first + vector.size - 1 for vector in flow.vectors), default=0)
    pairs = flow.equal.numpy()
    both = np.concatenate([pairs, -pairs])
    nodes = np.where(both < 0, count - both, both)  # -l is node count + l
    ones = np.ones(len(nodes), dtype=np.int8)
    from scipy.sparse import coo_array  # it takes long to import
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((ones, (nodes[:, 0], nodes[:, 1])), shape=(2 * count, 2 * count))
    _, component = connected_components(graph, directed=False)
    positive, negative = component[:count], component[count:]
    free = positive != negative
    free[0] = False
    return np.where(free, np.minimum(positive, negative), -1), positive > negative


def _groups(flow: Flow) -> list[Group]:
    number, inverse = _classes(flow)
    places: dict[int, dict[tuple[int, bool], list[int]]] = {}  # class -> (vector, inverse) -> elements
    for v, vector in enumerate(flow.vectors):
        for i, label in enumerate(range(vector.first, vector.first + vector.size)):
            if number[label] >= 0:
                places.setdefault(int(number[label]), {}).setdefault((v, bool(inverse[label])), []).append(i)
    alike: dict[tuple[tuple[int, bool], ...], list[dict[tuple[int, bool], list[int]]]] = {}
    for place in places.values():
        alike.setdefault(tuple(sorted(place)), []).append(place)
    found = []
    for key in sorted(alike):
        parts = [(flow.vectors[v], inverse, [place[v, inverse] for place in alike[key]]) for v, inverse in key]
        members = tuple(_member(*part) for part in parts)
        if _makes_and_reads(members):
            found.append(Group("", len(alike[key]), members))
    return found


def _member(vector: Vector, inverse: bool, elements: list[list[int]]) -> Member:
    channel = torch.full((vector.size,), -1, dtype=torch.long, device="cpu")
    for number, some in enumerate(elements):
        channel[some] = number
    return Member(vector.kind, vector.name, channel, inverse, vector.norm)


def _makes_and_reads(members: tuple[Member, ...]) -> bool:
    """Whether a value is made larger, and what reads it takes that up."""
    makers = {member.inverse for member in members if member.kind != COLUMNS}
    return bool(makers) and (len(makers) == 2 or any(member.kind == COLUMNS for member in members))


def _named(groups: list[Group]) -> list[Group]:
    """With a name for each that is its own: the first that makes its values, and the first that reads them."""
    found: Counter[str] = Counter()
    named = []
    for group in groups:
        makers = [member.name for member in group.members if member.kind != COLUMNS]
        readers = [member.name for member in group.of_kind(COLUMNS)]
        name = f"{makers[0]} -> {readers[0]}" if readers else f"{makers[0]} x {makers[-1]}"
        found[name] += 1
        named.append(replace(group, name=name if found[name] == 1 else f"{name} ({found[name]})"))
    return named


@torch.no_grad()
def scale(weights: Weights, group: Group, factors: Tensor) -> None:
    """Put ``factors`` (size,), float64 and above zero, into a model in place. Parameters in half precision stay that:
    factors that are powers of two change nothing but their exponents.
    """
    for member in group.members:
        own = member.spread(factors)
        if member.kind == GAIN:
            _scale_gain(weights, member, own)
        else:
            _scale_layer(weights, member, own)


def holds_half(weights: Weights, group: Group) -> bool:
    """Whether a parameter that factors of a group go into is stored in half precision."""
    norms = [member.norm for member in group.members if member.norm is not None]
    gains = (weights.tensor(name) for norm in norms for name in (norm.gain, norm.bias) if name is not None)
    return any(map(is_half, gains)) or any(
        weights.stores_half(member.name) for member in group.members if member.kind != GAIN
    )


def _scale_gain(weights: Weights, member: Member, own: Tensor) -> None:
    norm = member.norm
    assert norm is not None and norm.gain is not None, "what a gain's vector is made for"
    gain = weights.tensor(norm.gain)
    own = own.reshape(gain.shape).to(gain.device)
    gain.copy_((gain.double() + norm.offset) * own - norm.offset)
    if norm.bias is not None:
        bias = weights.tensor(norm.bias)
        bias.copy_(bias.double() * own.reshape(bias.shape))


def _scale_layer(weights: Weights, member: Member, own: Tensor) -> None:
    layer = weights.layers[member.name]
    assert layer.parameter is not None, "what a layer's vectors are made for"
    parameter = weights.tensor(layer.parameter)
    weight = layer.read(parameter).double()
    own = own.to(weight.device)
    if member.kind == ROWS:
        layer.write(parameter, weight * own.reshape(-1, *[1] * (weight.dim() - 1)))
        if (bias := weights.bias(member.name)) is not None:
            bias.copy_(bias.double() * own)
        return
    layer.write(parameter, weight / columns_of(own, weight, layer.groups))


def columns_of(own: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Numbers for each channel that a layer reads, as its weight (outputs, inputs of a group, ...) meets them."""
    wide = own.reshape(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
    return wide.reshape(*wide.shape, *[1] * (weight.dim() - 2))
