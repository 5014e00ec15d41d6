"""What the tensor of every site is to the operations around it, and what a target makes of that."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantkit.program.record import record
from quantkit.program.sites import place_sites
from quantkit.targets import Target
from quantkit.targets.roles import CANNOT, MUST
from tests.program.models import IMAGE, Net, Shortcuts, randn, settled

TARGET = Target.load("onnxruntime-cpu")


def roles_of(model: nn.Module, x: Tensor, target: Target = TARGET) -> dict[str, tuple[str, ...]]:
    found = record(model.eval(), ((x,), {}))
    return {site.name: site.roles for site in place_sites(model, found, target, list(found.calls))}


def test_roles_of_a_residual_network() -> None:
    assert roles_of(settled(Shortcuts()), IMAGE[0][0]) == {
        "input": ("layer input",),
        "/relu": ("layer output", "layer input", "addition operand"),
        "conv1": ("layer output", "addition operand"),
        "/add": ("layer input", "addition result", "addition operand"),
        "conv2": ("layer output", "addition operand"),
        "/relu.1": ("layer input", "addition result"),
    }


def rotated(x: Tensor) -> Tensor:
    half = torch.cat([-x[..., 2:], x[..., :2]], -1)
    return x * 0.8 + half * 0.6


MASK = torch.ones(5, 5, dtype=torch.bool).tril()
SCORES = {
    "scale": lambda s: s * 0.5,
    "mask": lambda s: s.masked_fill(~MASK, -1e9),
    "bias": lambda s: s / 2 + torch.randn(5, 5),
    "where": lambda s: torch.where(MASK, s, torch.tensor(-1e9)),
    "soft cap": lambda s: 30 * torch.tanh(s / 30),
    "moved": lambda s: s.flatten(0, 1).unflatten(0, s.shape[:2]),
}


class Attention(nn.Module):
    """Queries, keys and values from a layer each; rotated, with two queries for a key, or as they are."""

    def __init__(self, scores, rotate: bool = False, shared: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.scores, self.rotate, self.shared = scores, rotate, shared

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.rotate:
            q, k = rotated(q), rotated(k)
        if self.shared:
            k, v = (y[:, :1].expand(-1, 2, -1, -1) for y in (k, v))
        probabilities = F.dropout(self.scores(q @ k.mT).softmax(-1), 0.1, self.training)
        return self.o((probabilities @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_attention_is_a_softmax_between_two_products(scores, shared: bool) -> None:
    found = roles_of(Attention(scores, shared=shared), randn(2, 5, 8))
    assert found == {
        "input": ("layer input",),
        "q": ("query",),
        "k": ("key",),
        "v": ("value",),
        "/softmax": ("probabilities",),
        "/matmul.1": ("layer input",),
    }


def test_rotated_queries_and_keys_are_what_the_product_reads() -> None:
    """Sums make them, of what the projections make: these have no codes, what is multiplied has."""
    found = roles_of(Attention(SCORES["scale"], rotate=True), randn(2, 5, 8))
    assert {name: roles for name, roles in found.items() if "layer input" not in roles} == {
        "/add": ("query",),
        "/add.1": ("key",),
        "/softmax": ("probabilities",),
        "v": ("value",),
    }


def test_attention_of_float_layers_stays_float() -> None:
    model, x = Attention(SCORES["scale"], rotate=True).eval(), randn(2, 5, 8)
    found = place_sites(model, record(model, ((x,), {})), TARGET, ["o"])
    assert [site.roles for site in found] == [("layer input",)]


def test_one_tensor_may_be_all_three() -> None:
    model = Net(lambda self, x: F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1)), qkv=nn.Linear(8, 12))
    assert roles_of(model, randn(2, 5, 8))["qkv"] == ("query", "key", "value")


@pytest.mark.parametrize(
    "combine",
    [
        lambda a, b: a @ b.mT,
        lambda a, b: (a @ b.mT).tanh() @ b,
        lambda a, b: a.softmax(-1) @ b.mT,
        lambda a, b: F.layer_norm(a @ b.mT, (5,)).softmax(-1) @ b,  # no longer a score for each pair
    ],
)
def test_other_products_are_no_attention(combine) -> None:
    model = Net(lambda self, x: combine(self.a(x), self.b(x)), a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    found = roles_of(model, randn(2, 5, 8))
    assert "product operand" in found["b"]
    assert not {"query", "key", "probabilities", "value"} & {role for roles in found.values() for role in roles}


def test_a_target_that_adds_in_float_places_no_sites_for_sums() -> None:
    for role in ("addition operand", "addition result"):
        found = roles_of(settled(Shortcuts()), IMAGE[0][0], replace(TARGET, roles={role: CANNOT}))
        assert found == {
            "input": ("layer input",),
            "/relu": ("layer output", "layer input"),
            "conv1": ("layer output",),
            "/add": ("layer input",),
            "conv2": ("layer output",),
            "/relu.1": ("layer input",),
        }


def test_a_target_keeps_single_operands_float() -> None:
    without = replace(TARGET, roles={"probabilities": CANNOT, "layer output": CANNOT})
    assert "/softmax" not in roles_of(Attention(SCORES["scale"]), randn(2, 5, 8), without)
    assert list(roles_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh()), IMAGE[0][0], without)) == ["input"]


def test_the_role_that_needs_codes() -> None:
    target = replace(TARGET, roles={"query": MUST, "key": CANNOT})
    assert target.role_of_codes(("value", "query")) == "query"
    assert target.role_of_codes(("value", "key")) is None
    assert TARGET.role_of_codes(("layer input", "layer output")) == "layer output"
