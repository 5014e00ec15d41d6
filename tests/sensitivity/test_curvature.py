"""Derivatives of the damage against the explicit Hessian, and a model that is afterwards as it was before."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from quantkit.errors import InvalidRequest
from quantkit.sensitivity import ESTIMATORS
from quantkit.sensitivity.curvature import Landscape, gradients, hessian_product
from quantkit.sensitivity.hvp_pairs import hvp_pairs
from tests.sensitivity.explicit import Explicit
from tests.sensitivity.networks import (
    classifier,
    inputs,
    perturbed,
    request_of,
    sequences,
    subject_of,
    transformer,
)


def flags(model: nn.Module) -> list[bool]:
    return [p.requires_grad for p in model.parameters()] + [m.training for m in model.modules()]


@pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "in place"])
def test_product_is_that_of_the_explicit_hessian_by_weights_and_sites_together(inplace: bool) -> None:
    batches = inputs(12)
    model = classifier()
    for layer in model:
        if isinstance(layer, nn.ReLU):
            layer.inplace = inplace
    request = request_of(model, batches)
    exact = Explicit(request, batches)
    land = Landscape(subject_of(request, batches), perturbed(request))
    draw = torch.Generator().manual_seed(0)
    with land.opened():
        point = land.point(0)  # all samples are in one batch
        places = list(land.members)
        variables = [point.variables[p] for p in places]
        directions = [torch.randn(v.shape, generator=draw) for v in variables]
        first = gradients(point.loss, variables)
        found = hessian_product(first, variables, directions)
    flat = np.zeros(len(exact.gradient))
    for place, direction in zip(places, directions, strict=True):
        flat[exact.slots[place]] = direction.flatten().numpy()
    expected = exact.hessian @ flat
    for place, product in zip(places, found, strict=True):
        assert np.allclose(product.detach().flatten().numpy(), expected[exact.slots[place]], rtol=1e-3, atol=1e-6)
    assert max(float(g.detach().abs().max()) for g in first) < 1e-6


def test_flags_weights_and_attention_are_put_back_also_when_the_model_fails() -> None:
    batches = sequences()
    request = request_of(transformer(), batches)
    subject, changes = subject_of(request, batches), perturbed(request)
    model = subject.model
    model.head.bias.requires_grad_(False)
    model.blocks[1].mlp.train()
    before, state = flags(model), {n: t.clone() for n, t in model.state_dict().items()}
    hvp_pairs(subject, changes, False, torch.Generator())
    subject.base = changes[:1]
    land = Landscape(subject, changes)
    land.subject.batches[0] = ((torch.ones(2, 5, 7),), {})
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), land.opened():
            assert not torch.backends.cuda.flash_sdp_enabled()
            land.point(0)
        assert torch.backends.cuda.flash_sdp_enabled()
    assert flags(model) == before
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_second_derivatives_pass_through_attention_and_are_those_of_finite_differences() -> None:
    batches = sequences(6)
    request = request_of(transformer(), batches)
    land = Landscape(subject_of(request, batches), layers=["blocks.0.attention.qkv", "blocks.2.mlp.0"])
    draw = torch.Generator().manual_seed(0)
    with land.opened():
        variables = [land.weight(name) for name, _ in land.layers]
        directions = [torch.randn(v.shape, generator=draw) for v in variables]
        point = land.point(0)
        product = hessian_product(gradients(point.loss, variables), variables, directions)
        step, slopes = 1e-2, []
        for sign in (1, -1):
            for v, d in zip(variables, directions, strict=True):
                v.data += sign * step * d
            slopes.append(gradients(land.point(0).loss, variables, again=False))
            for v, d in zip(variables, directions, strict=True):
                v.data -= sign * step * d
    for up, down, exact in zip(*slopes, product, strict=True):
        assert torch.allclose((up - down) / (2 * step), exact, rtol=1e-2, atol=2e-2 * float(exact.abs().max()))


@pytest.mark.parametrize("name", ["gram", "kl", "noise", "fisher"])
def test_autocast_around_a_whole_estimator_changes_nothing(name: str) -> None:
    batches = inputs(12)
    request = request_of(classifier(), batches)
    subject, changes = subject_of(request, batches), perturbed(request)
    plain = ESTIMATORS[name](subject, changes, False, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = ESTIMATORS[name](subject, changes, False, torch.Generator().manual_seed(0))
    assert np.array_equal(plain.damage, mixed.damage)


def test_autocast_around_an_estimator_changes_nothing() -> None:
    batches = inputs(12)
    request = request_of(classifier(), batches)
    land = Landscape(subject_of(request, batches), perturbed(request))
    with torch.autocast("cpu", dtype=torch.bfloat16), land.opened():
        mixed = land.point(0)
    with land.opened():
        plain = land.point(0)
    assert mixed.outputs[0].dtype == torch.float32
    assert torch.equal(mixed.outputs[0], plain.outputs[0])


def test_no_graph_outlives_an_estimator() -> None:
    batches = inputs(40)
    request = request_of(classifier(), batches)
    subject, changes = subject_of(request, batches), perturbed(request)
    gc.collect()
    gc.disable()  # a graph kept by a cycle of references would stay
    try:
        before = count_graph_tensors()
        hvp_pairs(subject, changes, False, torch.Generator())
        after = count_graph_tensors()
    finally:
        gc.enable()
    assert after == before


def count_graph_tensors() -> int:
    return sum(type(t) is torch.Tensor and t.grad_fn is not None for t in gc.get_objects())


class Overwriting(nn.Module):
    """Overwrites what its norm has read: runs, but has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        y = self.norm(x)
        x += y
        return self.last(x)


def test_model_that_overwrites_what_gradients_need_is_refused_with_the_way_out() -> None:
    batches = inputs(12)
    request = request_of(Overwriting().eval(), batches)
    with pytest.raises(InvalidRequest, match=r"cannot be differentiated.*Choose 'gram'"):
        hvp_pairs(subject_of(request, batches), perturbed(request), False, torch.Generator())


class WithoutGradient(nn.Module):
    """A model meant for inference only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.parametrize("name", ["fisher", "first-order", "hessian-trace", "hessian-eigenvalue", "hvp-pairs"])
def test_model_that_switches_gradients_off_is_refused_and_not_found_harmless(name: str) -> None:
    batches = inputs(12)
    request = request_of(WithoutGradient().eval(), batches)
    changes = perturbed(request)
    with pytest.raises(InvalidRequest, match=r"torch\.no_grad\?\)\. Choose 'gram'"):
        ESTIMATORS[name](subject_of(request, batches), changes, False, torch.Generator())
    assert (ESTIMATORS["kl"](subject_of(request, batches), changes, False, torch.Generator()).damage > 0).all()
