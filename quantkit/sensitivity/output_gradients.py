"""Inner products of what changes do to a network with gradients of drawn labels, sample by sample.

Zeros are added to what every studied layer makes, and the log-likelihood of labels is differentiated by them; a layer
is linear in its weight, so what a change adds to its output is the same call with the change in the weight's place. A
layer that is not called with its weight itself (recurrent ones, parts and expressions of parameters) is run forward
with each change: the shift of the outputs has the same inner product with what the labels say of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.program.arguments import leaves_of, replaced
from quantkit.program.inputs import batch_size
from quantkit.program.intercept import OpKey
from quantkit.sensitivity.curvature import Landscape, Point
from quantkit.sensitivity.measure import Place
from quantkit.sensitivity.outputs import Outputs

Slopes = dict[OpKey | Place, Tensor]
LINEAR = ("linear", "embedding", "matmul", "bilinear")


def inner_products(land: Landscape, i: int, draws: int, generator: torch.Generator) -> Tensor:
    """<gradient of the log-likelihood of labels drawn anew, what a change adds> for batch ``i``: (K, draws, samples);
    one number for all samples together where some call does not keep them apart.
    """
    calls = Calls(land)
    point = land.point(i, calls.carry_out)
    count = max(1, batch_size(land.subject.batches[i]))
    variables: Slopes = dict(calls.added.items())
    variables |= {place: point.variables[place] for place in land.sites if place in point.variables}
    drawn = [land.damage.cotangent(tuple(o.detach() for o in point.outputs), generator) for _ in range(draws)]
    slopes = _slopes(point, variables, drawn)
    found = torch.zeros(len(land.perturbations), draws, count, dtype=torch.float64, device="cpu")
    apart = True
    with torch.no_grad():
        for k, one in enumerate(land.perturbations):
            if not (one.at_site or calls.follows(one.owner)):
                found[k] = _forward_products(land, i, k, drawn, point.outputs)
                continue
            for key, shift in _shifts(land, calls, point, k):
                products = per_sample(slopes[key], shift, count)
                apart &= products.shape[1] == count
                found[k, :, : products.shape[1]] += products
    return found if apart else found.sum(2, keepdim=True)


class Calls:
    """The calls that read studied weights: what they were called with, and zeros added to what they make."""

    def __init__(self, land: Landscape) -> None:
        floats = land.subject.floats
        self.land, self.names = land, [name for name, _ in land.layers]
        held = {name: floats.layers[name] for name in self.names}
        linear = {n for n, w in held.items() if w.kind in LINEAR or w.kind.startswith("conv")}
        self.holders = {n: floats.tensor(w.parameter) for n, w in held.items() if n in linear and w.parameter}
        self.parameters = {id(tensor) for tensor in self.holders.values()}
        self.made: dict[OpKey, tuple[Callable[..., Any], Any, Any, Tensor, Tensor | None]] = {}
        self.added: dict[OpKey, Tensor] = {}
        self._copies: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def carry_out(self, key: OpKey, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """One call; what it makes is differentiable by the zeros that are added."""
        read = [leaf for leaf in leaves_of((args, kwargs)) if id(leaf) in self.parameters]
        made = func(*args, **kwargs)
        if len(read) != 1 or not isinstance(made, Tensor):
            return made
        own, named = replaced((args, kwargs), lambda x: x if x is read[0] else self._without_bias(x))
        rest = _with(func, own, named, read[0], torch.zeros_like(read[0]))
        self.made[key] = func, own, named, read[0], rest if rest.any() else None
        return made + self.added.setdefault(key, torch.zeros_like(made).requires_grad_())

    def _without_bias(self, x: Any) -> Any:
        """Zeros for a parameter, any other tensor as it is now, whatever the model does to it later."""
        if not isinstance(x, Tensor):
            return x
        if isinstance(x, nn.Parameter):
            return torch.zeros_like(x, requires_grad=False)
        key = (id(x), x._version)
        if key not in self._copies:  # holds the tensor too, so that its identity is its own
            self._copies[key] = x, x.detach().clone()
        return self._copies[key][1]

    def follows(self, layer: str) -> bool:
        """Whether the layer was called with the tensor that holds its weight, or with none."""
        holder = self.holders.get(layer)
        return holder is not None and any(held is holder for *_, held, _ in self.made.values())

    def shifts(self, layer: str, displacement: Tensor) -> Iterable[tuple[OpKey, Tensor]]:
        """What every call that reads a layer's weight adds to its output where the weight is moved so."""
        holder, weight = self.holders[layer], self.land.subject.floats.layers[layer]
        nothing = torch.zeros_like(holder.detach(), dtype=displacement.dtype)
        moved = weight.placed(nothing, displacement)
        for key, (func, args, kwargs, held, rest) in self.made.items():
            if held is holder:
                made = _with(func, args, kwargs, held, moved)
                yield key, made if rest is None else made - rest


def _with(func: Callable[..., Any], args: Any, kwargs: Any, held: Tensor, operand: Tensor) -> Tensor:
    args, kwargs = replaced((args, kwargs), lambda x: operand if x is held else x)
    made: Tensor = func(*args, **kwargs)
    return made


def _slopes(point: Point, variables: Slopes, drawn: list[list[Tensor]]) -> Slopes:
    """Gradients of the drawn log-likelihoods, summed over the rows, a first dimension for the draws."""
    found = []
    for number, cotangents in enumerate(drawn):
        live = [(output, c) for output, c in zip(point.outputs, cotangents, strict=True) if output.requires_grad]
        found.append(
            torch.autograd.grad(
                [output for output, _ in live],
                list(variables.values()),
                [c for _, c in live],
                retain_graph=number + 1 < len(drawn),
                allow_unused=True,
                materialize_grads=True,
            )
        )
    return {key: torch.stack(slopes) for key, slopes in zip(variables, zip(*found, strict=True), strict=True)}


def _shifts(land: Landscape, calls: Calls, point: Point, k: int) -> Iterable[tuple[OpKey | Place, Tensor]]:
    """What perturbation ``k`` adds to the outputs of the calls that read its weight, or to its site's tensor."""
    one, moved = land.perturbations[k], land.displacement(k, point)
    if moved is None:
        return []
    return [(one.place, moved)] if one.at_site else calls.shifts(one.owner, moved)


def _forward_products(land: Landscape, i: int, k: int, drawn: list[list[Tensor]], here: Outputs) -> Tensor:
    """The inner products (draws, samples) of perturbation ``k``, from the shift of the outputs that it makes."""
    batch = land.subject.batches[i]
    moved = land.outputs_with(i, land.perturbations[k])
    numbers = land.damage.rule.samples([batch], [[len(rows) for rows in here]])
    count = max(1, batch_size(batch))
    found = torch.zeros(len(drawn), count, dtype=torch.float64, device="cpu")
    for d, cotangents in enumerate(drawn):
        for c, before, after, samples in zip(cotangents, here, moved, numbers, strict=True):
            products = (c * (after - before.detach())).sum(-1).double().cpu()
            found[d].index_add_(0, samples.clamp(max=count - 1), products)
    return found


def per_sample(slopes: Tensor, shift: Tensor, count: int) -> Tensor:
    """Inner products (draws, count) of each sample's elements, for ``slopes`` (draws, ...) and ``shift`` (...) with
    samples along the first dimension of the latter. Where that cannot be, one (draws, 1) of the whole batch.
    """
    if shift.dim() and len(shift) == count:
        rows = shift.reshape(count, -1)
        return torch.einsum("rnd,nd->rn", slopes.reshape(len(slopes), count, -1), rows).double().cpu()
    return (slopes.flatten(1).double().cpu() @ shift.flatten().double().cpu()).unsqueeze(1)
