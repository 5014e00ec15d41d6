"""Inner products of what changes do to a network with gradients of drawn labels, sample by sample.

Zeros are added to what every studied layer makes, and the log-likelihood of labels is differentiated by them; a layer
is linear in its weight, so what a change adds to its output is the same call with the change in the weight's place. A
layer that is not called with its weight itself (recurrent ones, parts and expressions of parameters) is run forward
with each change: the shift of the outputs has the same inner product with what the labels say of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quantkit.program.arguments import leaves_of, replaced
from quantkit.program.inputs import batch_size
from quantkit.program.intercept import OpKey
from quantkit.program.updates import named_state
from quantkit.sensitivity.curvature import Landscape
from quantkit.sensitivity.measure import Place

LINEAR = ("linear", "embedding", "matmul", "bilinear")


@dataclass(frozen=True)
class Pass:
    """Gradients of every draw by what ``calls`` make and by sites, of a batch or of a segment of it; ``raw`` and
    ``here`` as ``Point`` has them.
    """

    calls: Calls
    slopes: Mapping[OpKey | Place, Sequence[Tensor]]
    raw: Mapping[str, Tensor]
    here: Mapping[str, Tensor]

    def shifts(self, land: Landscape, k: int) -> Iterable[tuple[OpKey | Place, Tensor]]:
        """What perturbation ``k`` adds to the outputs of the calls that read its weight, or to its site's tensor."""
        one = land.perturbations[k]
        if not (one.owner in self.raw if one.at_site else self.calls.follows(one.owner)):
            return []
        moved = land.displacement(k, self)
        if moved is None:
            return []
        return [(one.place, moved)] if one.at_site else self.calls.shifts(one.owner, moved)


Passes = Callable[[Landscape, int, int, torch.Generator], Iterable[Pass]]


def whole(land: Landscape, i: int, draws: int, generator: torch.Generator) -> Iterator[Pass]:
    """One pass: the graph of batch ``i``."""
    calls = Calls(land, batch_size(land.subject.batches[i]) == 1)
    point = land.point(i, calls.carry_out)
    variables: dict[OpKey | Place, Tensor] = dict(calls.added.items())
    variables |= {place: point.variables[place] for place in land.sites if place in point.variables}
    slopes: dict[OpKey | Place, list[Tensor]] = {key: [] for key in variables}
    for number in range(draws):
        cotangents = land.damage.cotangent(tuple(output.detach() for output in point.outputs), generator)
        found = gradients(point.outputs, list(variables.values()), cotangents, keep=number + 1 < draws)
        for kept, slope in zip(slopes.values(), found, strict=True):
            kept.append(slope)
    yield Pass(calls, slopes, point.raw, point.here)


def inner_products(land: Landscape, i: int, draws: int, generator: torch.Generator, passes: Passes = whole) -> Tensor:
    """<gradient of the log-likelihood of labels drawn anew, what a change adds> for batch ``i``: (K, draws, samples);
    one number for all samples together where some call does not keep them apart.
    """
    count = max(1, batch_size(land.subject.batches[i]))
    products = torch.zeros(len(land.perturbations), draws, count, dtype=torch.float64, device="cpu")
    start, apart, followed = generator.get_state(), True, set[str]()
    for one in passes(land, i, draws, generator):
        followed |= {name for name, _ in land.layers if one.calls.follows(name)}
        with torch.no_grad():
            for k in range(len(land.perturbations)):
                for key, shift in one.shifts(land, k):
                    own = per_sample(one.slopes[key], shift, count)
                    apart &= own.shape[1] == count
                    products[k, :, : own.shape[1]] += own
        del one  # before the next one is made
    others = [k for k, p in enumerate(land.perturbations) if not p.at_site and p.owner not in followed]
    if others:
        products[others] = _forward_products(land, i, others, draws, start)
    return products if apart else products.sum(2, keepdim=True)


@dataclass(frozen=True)
class _Call:
    """What was called with which weight among the arguments, and what it makes of a weight of zeros, where that is
    something; ``by_weight``: it is differentiated by the weight.
    """

    func: Callable[..., Any]
    args: Any
    kwargs: Any
    held: Tensor
    rest: Tensor | None = None
    by_weight: bool = False

    def of(self, operand: Tensor) -> Tensor:
        """What the call makes of another weight."""
        args, kwargs = replaced((self.args, self.kwargs), lambda x: operand if x is self.held else x)
        made: Tensor = self.func(*args, **kwargs)
        return made


class Calls:
    """The calls that read studied weights, and what each is differentiated by: zeros added to what it makes, or, where
    that is larger and of a ``single`` sample, its weight.
    """

    def __init__(self, land: Landscape, single: bool = False, state: Mapping[str, Tensor] | None = None) -> None:
        """``state`` has the parameters by name that calls read, by default the model's own."""
        self.land, self.single = land, single
        floats = land.subject.floats
        self.state = named_state(land.subject.model) if state is None else state
        self.stored = {id(x) for x in self.state.values()}
        held = {name: floats.layers[name] for name, _ in land.layers}
        linear = {n: w for n, w in held.items() if w.kind in LINEAR or w.kind.startswith("conv")}
        self.holders = {n: self.state[w.parameter] for n, w in linear.items() if w.parameter}
        self.parameters = {id(tensor) for tensor in self.holders.values()}
        self.made: dict[OpKey, _Call] = {}
        self.added: dict[OpKey, Tensor] = {}
        self._copies: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def carry_out(self, key: OpKey, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """One call; what it makes is differentiable by the zeros that are added."""
        read = [leaf for leaf in leaves_of((args, kwargs)) if id(leaf) in self.parameters]
        made = func(*args, **kwargs)
        if len(read) != 1 or not isinstance(made, Tensor):
            return made
        (held,) = read
        if self.single and made.numel() > held.numel():
            del made
            call = self.made[key] = _Call(func, args, kwargs, held, by_weight=True)
            return call.of(self.added.setdefault(key, held.detach().requires_grad_()))
        own, named = replaced((args, kwargs), lambda x: x if x is held else self._without_bias(x))
        call = _Call(func, own, named, held)
        rest = call.of(torch.zeros_like(held))
        self.made[key] = replace(call, rest=rest) if rest.any() else call
        return made + self.added.setdefault(key, torch.zeros_like(made).requires_grad_())

    def _without_bias(self, x: Any) -> Any:
        """Zeros for a parameter or buffer, any other tensor as it is now, whatever the model does to it later."""
        if not isinstance(x, Tensor):
            return x
        if id(x) in self.stored:
            return torch.zeros_like(x, requires_grad=False)
        key = (id(x), x._version)
        if key not in self._copies:  # holds the tensor too, so that its identity is its own
            self._copies[key] = x, x.detach().clone()
        return self._copies[key][1]

    def follows(self, layer: str) -> bool:
        """Whether the layer was called with the tensor that holds its weight, or with none."""
        holder = self.holders.get(layer)
        return holder is not None and any(call.held is holder for call in self.made.values())

    def shifts(self, layer: str, displacement: Tensor) -> Iterable[tuple[OpKey, Tensor]]:
        """What every call that reads a layer's weight adds to its output where the weight is moved so."""
        holder, weight = self.holders[layer], self.land.subject.floats.layers[layer]
        nothing = torch.zeros_like(holder.detach(), dtype=displacement.dtype)
        moved = weight.placed(nothing, displacement)
        for key, call in self.made.items():
            if call.held is holder and call.by_weight:
                yield key, moved
            elif call.held is holder:
                yield key, call.of(moved) if call.rest is None else call.of(moved) - call.rest


def gradients(
    outputs: Sequence[Tensor], variables: Sequence[Tensor], cotangents: Sequence[Tensor], keep: bool
) -> tuple[Tensor, ...]:
    """The gradients of <outputs, cotangents>; the graph stays where it is to be kept."""
    live = [(output, c) for output, c in zip(outputs, cotangents, strict=True) if output.requires_grad]
    if not live or not variables:
        return tuple(torch.zeros_like(v) for v in variables)
    return torch.autograd.grad(
        [output for output, _ in live],
        list(variables),
        [c for _, c in live],
        retain_graph=keep,
        allow_unused=True,
        materialize_grads=True,
    )


def _forward_products(land: Landscape, i: int, which: Sequence[int], draws: int, start: Tensor) -> Tensor:
    """The inner products (some, draws, samples) of some perturbations, from the shifts of the outputs that they make
    and the labels drawn from a generator's state.
    """
    batch = land.subject.batches[i]
    here = land.outputs_with(i)
    generator = torch.Generator().set_state(start)
    drawn = [land.damage.cotangent(here, generator) for _ in range(draws)]
    numbers = land.damage.rule.samples([batch], [[len(rows) for rows in here]])
    count = max(1, batch_size(batch))
    found = torch.zeros(len(which), draws, count, dtype=torch.float64, device="cpu")
    for own, k in zip(found, which, strict=True):
        moved = land.outputs_with(i, land.perturbations[k])
        for d, cotangents in enumerate(drawn):
            for c, before, after, samples in zip(cotangents, here, moved, numbers, strict=True):
                products = (c * (after - before)).sum(-1).double().cpu()
                own[d].index_add_(0, samples.clamp(max=count - 1), products)
    return found


def per_sample(slopes: Sequence[Tensor], shift: Tensor, count: int) -> Tensor:
    """Inner products (draws, count) of each sample's elements, for the ``slopes`` of every draw and a ``shift`` with
    samples along its first dimension. Where that cannot be, one (draws, 1) of the whole batch.
    """
    if shift.dim() and len(shift) == count:
        rows = shift.reshape(count, -1)
        return torch.stack([torch.linalg.vecdot(one.reshape(count, -1), rows) for one in slopes]).double().cpu()
    flat = shift.flatten()
    return torch.stack([_dot(one.flatten(), flat) for one in slopes]).unsqueeze(1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """An inner product, summed in float64 some elements at a time."""
    pairs = zip(a.split(1 << 20), b.split(1 << 20), strict=True)
    return torch.stack([one.double() @ other.double() for one, other in pairs]).sum().cpu()
