"""Representations are told from scores of classes by what makes them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quantkit
from quantkit.program.record import record
from quantkit.program.representations import is_representation
from tests.program.models import randn
from tests.program.networks import ZOO


class Tower(nn.Module):
    """Two layers, and what ``end`` makes of what enters the last of them and of what it makes."""

    def __init__(self, end) -> None:
        super().__init__()
        self.first, self.last, self.end = nn.Linear(8, 6), nn.Linear(6, 6), end

    def forward(self, x):
        hidden = F.relu(self.first(x))
        return self.end(hidden, self.last(hidden))


def rms_norm(hidden, x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


REPRESENTATIONS = {
    "a norm": lambda hidden, x: F.layer_norm(x, (6,)),
    "a norm that is written out": rms_norm,
    "a unit vector": lambda hidden, x: F.normalize(x, dim=-1),
    "a mean of normed positions": lambda hidden, x: F.layer_norm(x, (6,)).mean(1),
    "a residual sum": lambda hidden, x: hidden + x,
    "a residual sum in place": lambda hidden, x: x.add_(hidden),
}
SCORES = {
    "a layer": lambda hidden, x: x,
    "probabilities": lambda hidden, x: x.softmax(-1),
    "a mean of scores": lambda hidden, x: x.mean(1),
    "capped scores": lambda hidden, x: 30 * torch.tanh(x / 30),
    "scores with a constant": lambda hidden, x: x + 1,
}


def program_of(end):
    return record(Tower(end).eval(), ((randn(4, 3, 8),), {}))


@pytest.mark.parametrize("end", REPRESENTATIONS)
def test_what_norms_and_residuals_make_is_a_representation(end):
    assert is_representation(program_of(REPRESENTATIONS[end]))


@pytest.mark.parametrize("end", SCORES)
def test_what_layers_make_are_scores(end):
    assert not is_representation(program_of(SCORES[end]))


def test_sums_of_two_layers_scores_are_scores():
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.deep = nn.Linear(8, 5), nn.Linear(8, 5)

        def forward(self, x):
            return self.wide(x) + self.deep(x.relu())

    assert not is_representation(record(Wide().eval(), ((randn(4, 8),), {})))


@pytest.mark.parametrize(
    "name", ["densenet", "unet", "vit_with_attention_module", "language_model_with_tied_embedding"]
)
def test_classifiers_make_scores(name):
    model, batch = ZOO[name].build()
    assert not is_representation(record(model.eval(), batch))


def test_representations_are_compared_by_their_squared_error():
    found = {}
    for name, end in (("unit", REPRESENTATIONS["a unit vector"]), ("scores", SCORES["a layer"])):
        model = Tower(end).eval()
        profile = quantkit.profile(model, randn(32, 3, 8), schemes=["w4", "w8"], progress=False)
        found[name] = profile.provenance["outputs"]["outputs"][0]["loss"]
    assert found == {"unit": "mse", "scores": "kl"}
