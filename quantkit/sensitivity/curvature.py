"""A subject's damage as a function to differentiate: by the weights of its layers and by the tensors at its sites.

The damage of the float model has zero gradient and, as its Hessian, the Fisher information (docs/methods/damage.md). A
site's tensor is not cut out of the graph: zeros are added to it, and derivatives are taken by these. Everything is
float32, in eval mode, without autocast, and with attention computed by plain products: fused attention has no second
derivative (docs/methods/hessian-trace.md). ``torch.autograd.grad`` is used throughout, since gradients that
``backward`` would store keep their graph alive.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from quantkit.errors import InvalidRequest
from quantkit.program.inputs import Batch, batch_size, first_samples, split_batches
from quantkit.program.intercept import Handler, OpKey, tensors_of
from quantkit.program.sites import Site
from quantkit.program.updates import plain_mode, restored, without_autocast
from quantkit.sensitivity.by_place import members_of
from quantkit.sensitivity.damage import Reference
from quantkit.sensitivity.measure import Perturbation, Place, Subject, applied, swapped_weights
from quantkit.sensitivity.outputs import Outputs
from quantkit.simulation.model import at_sites, run_with

GRAPH_SAMPLES = 64  # a graph of second derivatives holds every activation of its samples several times
GRAPH_BYTES = 1 << 28  # and once these many bytes, or those of one sample


@dataclass(frozen=True)
class Point:
    """Batch ``number`` with its graph: ``outputs`` are (rows, classes) for each output that counts.

    ``variables``: what the loss can be differentiated by, a weight or the zeros added to a site's tensor; places the
    batch does not reach have none. ``raw`` and ``here``: a site's tensor before and after the base plan's quantizer.
    """

    known: Reference
    number: int
    outputs: Outputs
    variables: Mapping[Place, Tensor]
    raw: Mapping[str, Tensor] = field(default_factory=dict)
    here: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def reference(self) -> Outputs:
        """The float model's outputs."""
        return self.known.outputs[self.number]

    @cached_property
    def loss(self) -> Tensor:
        """The batch's share of the mean damage."""
        return self.known.damage.share(self.reference, self.outputs)


class Seen(Protocol):
    """What a pass saw at sites: their tensors before and after the base plan's quantizers."""

    @property
    def raw(self) -> Mapping[str, Tensor]: ...

    @property
    def here(self) -> Mapping[str, Tensor]: ...


@contextmanager
def _explained() -> Iterator[None]:
    """The error that torch raises for a tensor overwritten in place, as an InvalidRequest."""
    try:
        yield
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise InvalidRequest(
            f"The model cannot be differentiated: it overwrites in place what its gradient needs ({error}). "
            "Choose 'gram', 'kl' or another estimator that only runs the model forward."
        ) from error


class Landscape:
    """The damage around a subject's base plan, batch by batch, and the displacements that perturbations are there.

    Use it inside ``opened``. ``layers`` are studied besides those that are perturbed. Memory: the graph of one batch
    of at most ``GRAPH_SAMPLES`` samples and ``GRAPH_BYTES``. ``by_weights``: whether the damage is
    differentiated by the weights of layers, too; ``share``: of the ``GRAPH_BYTES`` that may be taken; ``most``:
    samples at a time.
    """

    def __init__(
        self,
        subject: Subject,
        perturbations: Sequence[Perturbation] = (),
        layers: Sequence[str] = (),
        by_weights: bool = True,
        share: float = 1.0,
        most: int = GRAPH_SAMPLES,
    ) -> None:
        self.by_weights, self.sample_bytes = by_weights, sample_bytes(subject)
        self.most_bytes = int(share * GRAPH_BYTES)
        fitting = max(1, self.most_bytes // max(1, self.sample_bytes))
        self.subject = replace(subject, batches=split_batches(subject.batches, min(most, fitting)))
        self.perturbations = perturbations
        studied: dict[Place, list[int]] = {(name, False): [] for name in layers}
        self.members = studied | members_of(perturbations)
        self.reference = Reference.of(self.subject)
        self.damage = self.reference.damage
        self.rows = self.damage.counts[0]
        self.base_weights, self.base_sites = applied(subject.base)

    def __len__(self) -> int:
        return len(self.subject.batches)

    def weight(self, layer: str) -> nn.Parameter:
        """A layer's weight; raises InvalidRequest where that is no parameter: nothing can be differentiated by it."""
        weight = self.subject.floats[layer]
        if not isinstance(weight, nn.Parameter):
            raise InvalidRequest(
                f"The weight of {layer!r} is computed, or a part of a parameter, which estimators that differentiate "
                "do not follow yet. Choose 'gram', 'kl' or another estimator that only runs the model forward."
            )
        return weight

    def elements(self, layer: str) -> int:
        """How many elements a layer's weight has."""
        return math.prod(self.subject.floats.layers[layer].shape)

    @property
    def shares(self) -> np.ndarray:
        """The share of all rows that each batch has, by its mean over the outputs."""
        return (np.array(self.reference.counts) / np.array(self.damage.counts)).mean(1)

    @property
    def layers(self) -> list[Place]:
        return [place for place in self.members if not place[1]]

    @property
    def sites(self) -> list[Place]:
        return [place for place in self.members if place[1]]

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The model at the base plan and ready to be differentiated by the perturbed weights; as it was on the way
        out, whatever happens. Raises InvalidRequest for a model that overwrites what its gradient needs.
        """
        model, floats = self.subject.model, self.subject.floats
        exact = {name: floats[name] for name, _ in self.layers if floats.stores_half(name)}  # for exact gradients
        with restored(model), swapped_weights(floats, exact | self.base_weights):
            weights = [self.weight(name) for name, _ in self.layers] if self.by_weights else []
            with differentiable(model, weights), _explained():
                yield

    def point(self, i: int, call: Handler | None = None) -> Point:
        """Run batch ``i``; ``call(key, func, args, kwargs)`` carries out every torch call, ahead of what sites do to
        what it makes. Raises InvalidRequest where nothing has a gradient.
        """
        by = self.layers if self.by_weights else []
        variables: dict[Place, Tensor] = {place: self.weight(place[0]) for place in by}
        raw: dict[str, Tensor] = {}
        here: dict[str, Tensor] = {}

        def change(site: Site, x: Tensor) -> Tensor:
            raw[site.name] = x.detach().clone()  # the model may overwrite it in place
            value = self.base_sites[site.name](x) if site.name in self.base_sites else x
            here[site.name] = value.detach().clone()
            if (site.name, True) in self.members:
                # an in-place operation asks twice for its result
                value = value + variables.setdefault((site.name, True), torch.zeros_like(value).requires_grad_())
            return value

        watched = [self.subject.sites[name] for name in dict.fromkeys([*self.base_sites, *(n for n, _ in self.sites)])]
        args, kwargs = self.subject.batches[i]
        result = run_with(self.subject.model, at_sites(watched, change), args, kwargs, call=call)
        outputs = self.damage.rule.rows(result, (args, kwargs))
        if torch.is_grad_enabled() and self.members and not any(o.requires_grad for o in outputs):
            raise InvalidRequest(
                "The model cannot be differentiated: its output does not depend on any layer or site under study by "
                "operations that have a gradient (is its forward wrapped in torch.no_grad?). Choose 'gram', 'kl' or "
                "another estimator that only runs the model forward."
            )
        return Point(self.reference, i, outputs, variables, raw, here)

    def displacement(self, k: int, point: Seen) -> Tensor | None:
        """How perturbation ``k`` moves its weight or its site's tensor away from the base; None where the batch does
        not reach the site.
        """
        one = self.perturbations[k]
        if one.change.stored:
            weight = self.subject.floats[one.owner].detach()
            return one.change.dequantize().to(weight) - weight
        if one.owner not in point.raw:
            return None
        return one.change.fake_quantize(point.raw[one.owner]) - point.here[one.owner]

    def outputs_with(self, i: int, *changes: Perturbation) -> Outputs:
        """The outputs for batch ``i`` with perturbations in place."""
        return next(replace(self.subject, batches=[self.subject.batches[i]]).outputs(changes))


def sample_bytes(subject: Subject) -> int:
    """Bytes of all that a forward of one sample makes, with the largest inputs: what its graph holds."""
    largest = max(subject.batches, key=lambda batch: _elements(batch) / max(1, batch_size(batch)), default=None)
    if largest is None:
        return 0
    held: dict[int, Tensor] = {}

    def hold(key: OpKey, x: Tensor) -> Tensor:
        held.setdefault(x.untyped_storage().data_ptr(), x)
        return x

    args, kwargs = first_samples(largest, 1)
    updated = () if subject.program is None else subject.program.updated
    with plain_mode(subject.model), restored(subject.model, updated):
        run_with(subject.model, hold, args, kwargs)
    return sum(x.untyped_storage().nbytes() for x in held.values())


def _elements(batch: Batch) -> int:
    return sum(x.numel() for x in tensors_of(batch))


@contextmanager
def differentiable(model: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients on, for these weights alone; eval mode, float32, plain attention. Every flag is put back."""
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), without_autocast(model):
            yield
    finally:
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
        for module, mode in training:
            module.training = mode


def gradients(value: Tensor, variables: Sequence[Tensor], again: bool = True) -> list[Tensor]:
    """The gradient by each variable, zeros where there is none; ``again``: to be differentiated once more."""
    if not value.requires_grad or not variables:
        return [torch.zeros_like(v) for v in variables]
    return list(
        torch.autograd.grad(value, list(variables), create_graph=again, allow_unused=True, materialize_grads=True)
    )


def hessian_product(
    first: Sequence[Tensor],
    variables: Sequence[Tensor],
    direction: Sequence[Tensor],
    by: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Hessian times ``direction`` by double backward (Pearlmutter, 1994), given the gradients ``first`` by
    ``variables``; the block of rows belonging to ``by`` (default ``variables``). The graph stays usable.
    """
    by = list(variables if by is None else by)
    live = [(g, v) for g, v in zip(first, direction, strict=True) if g.requires_grad]
    if not live or not by:
        return [torch.zeros_like(v) for v in by]
    slopes, along = zip(*live, strict=True)
    return list(torch.autograd.grad(slopes, by, along, retain_graph=True, allow_unused=True, materialize_grads=True))


def inner(a: Tensor, b: Tensor) -> float:
    """Inner product, summed in float64."""
    return float((a.detach().double() * b.detach().double()).sum())
