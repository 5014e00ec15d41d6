"""First and last layers are found by what they read and make, whatever they are called."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantkit.program.ends import first_layers, last_layers
from quantkit.program.record import record, unrecorded
from tests.program.models import randn
from tests.stages.networks import ConvReused, ImageAndFeatures, MobileNet, small

VIT = import_module("recipes.models.digits_vit")


class Preprocessing(nn.Module):
    """Normalizes its own input, adds the input to what a layer made of it, and ends in two heads behind a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.b, self.a, self.d = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))

    def forward(self, x):
        x = self.b(self.c((x - 0.5) / 2) + x)
        return {"one": self.a(x).softmax(1), "two": torch.sigmoid(self.d(F.relu(x)))}


class Residual(nn.Module):
    """Its output is a sum of what two layers made."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.side = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.stem(x)
        return self.body(x.relu()) + self.side(x)


IMAGE = (randn(2, 3, 8, 8),)
CASES: dict[str, tuple[nn.Module, tuple[Tensor, ...], list[str], list[str]]] = {
    "usual": (small(), (randn(2, 2, 6, 6),), ["stem.0"], ["head"]),
    "mobile": (MobileNet().eval(), IMAGE, ["stem.0"], ["head"]),
    "two inputs": (ImageAndFeatures(), (*IMAGE, randn(2, 5)), ["look", "read"], ["classify"]),
    "one layer twice": (ConvReused(), IMAGE, ["stem"], ["head"]),
    "preprocessing": (Preprocessing(), IMAGE, ["c"], ["a", "d"]),
    "a sum": (Residual(), (randn(2, 4),), ["stem"], ["body", "side"]),
    "one layer": (nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), (randn(2, 3, 4),), ["1"], ["1"]),
    "called first and last": (nn.Sequential(layer := nn.Linear(4, 4), nn.ReLU(), layer), (randn(2, 4),), ["0"], ["0"]),
    "transformer": (VIT.build().eval(), (randn(2, 1, 8, 8),), ["patch_embed"], ["head"]),
}


@pytest.mark.parametrize(("model", "inputs", "first", "last"), CASES.values(), ids=list(CASES))
def test_ends(model: nn.Module, inputs: tuple[Tensor, ...], first: list[str], last: list[str]) -> None:
    found = record(model, (inputs, {}))
    assert (first_layers(found), last_layers(found)) == (first, last)


def test_nobody_knows_without_a_trace() -> None:
    found = unrecorded(small())
    assert first_layers(found) == last_layers(found) == []
