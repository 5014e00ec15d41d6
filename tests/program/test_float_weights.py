"""Weights that multiply activations and are no layer that could be quantized stand in every list, and count in bits
and bytes; those that are no parameters are told at once.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quantkit
from quantkit.program.ownership import ownership
from quantkit.targets import Target
from quantkit.transforms.prepare import prepare


class Paired(nn.Module):
    """A bilinear form as a module or by the function, or distances to prototypes, between two linear layers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.inward, self.head = kind, nn.Linear(8, 8), nn.Linear(32, 3)
        if kind == "module":
            self.form = nn.Bilinear(8, 8, 32)
        else:
            shape = (32, 8) if kind == "distances" else (32, 8, 8)
            self.form = nn.Parameter(torch.randn(shape) / 8)
        self.position, self.gain = nn.Parameter(torch.randn(4, 8)), nn.LayerNorm((4, 8))

    def forward(self, x):
        y = self.gain(F.relu(self.inward(x)) + self.position).mean(1)
        made = {
            "module": lambda: self.form(y, x[:, 0]),
            "function": lambda: F.bilinear(y, x[:, 0], weight=self.form),
            "distances": lambda: torch.cdist(y, self.form),
        }
        return self.head(made[self.kind]())


@pytest.mark.parametrize("kind", ["module", "function", "distances"])
def test_what_multiplies_and_is_no_layer_is_listed_and_counted(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Paired(kind).eval(), torch.randn(64, 4, 8)
    ready = prepare(model, [((x,), {})], Target.load("onnxruntime-cpu"))
    elements = 32 * 8 if kind == "distances" else 32 * 8 * 8
    found = {name: layer.float_bytes for name, layer in ready.layers.items() if layer.reason}
    assert found == {"form": 4 * elements}
    owned = [part for part in ownership(ready.model, ready.program) if part.layer == "form"]
    assert [part.elements for part in owned] == [elements]

    plan = quantkit.quantize(model, "w8a8", x, progress=False).plan
    assert plan.schemes["form"].is_float
    assert 8 < plan.average_bits < 32
    coded = 8 * 8 + 32 * 3
    assert plan.average_bits == pytest.approx((32 * elements + 8 * coded + 32 * (8 + 3)) / (elements + coded))
    assert "form" in str(plan)
    assert "position" not in str(plan)


SHARED = nn.Linear(8, 8)


class Elsewhere(nn.Module):
    """A layer that is held in a list, in a dict, by nobody, or as a plain tensor."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.head = where, nn.Linear(8, 3)
        self.held = {
            "list": [nn.Linear(8, 8)],
            "dict": {"first": nn.Linear(8, 8)},
            "tensor": torch.randn(8, 8) / 3,
            "computed": nn.Linear(8, 8).weight * 2,
            "global": None,
        }[where]

    def forward(self, x):
        if self.where in ("list", "dict"):
            layer = self.held[0] if self.where == "list" else self.held["first"]
            return self.head(F.relu(layer(x)))
        return self.head(F.relu(SHARED(x) if self.held is None else x @ self.held))


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("list", r"held\[0\].weight"),
        ("dict", r"held\['first'\].weight"),
        ("tensor", "held"),
        ("computed", "held"),
        ("global", "what /linear reads"),
    ],
)
def test_weights_outside_the_models_parameters_are_told(where: str, name: str, caplog) -> None:
    torch.manual_seed(0)
    prepare(Elsewhere(where).eval(), [((torch.randn(16, 8),), {})], Target.load("onnxruntime-cpu"))
    said = [record for record in caplog.records if "outside the model's parameters" in record.message]
    assert [record.levelname for record in said] == ["WARNING"]
    assert f"{name} (8, 8)".replace("\\", "") in said[0].message


def test_matrices_that_the_code_makes_are_no_weights(caplog) -> None:
    class Made(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head(x @ torch.tril(torch.ones(8, 8)))

    prepare(Made().eval(), [((torch.randn(16, 8),), {})], Target.load("onnxruntime-cpu"))
    assert "outside" not in caplog.text
