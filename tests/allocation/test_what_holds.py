"""A limit that cannot be met names what holds the size up, the largest first, and asks for nothing that is no help."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quantkit
from quantkit.errors import InfeasibleBudget


class Table(nn.Module):
    """Positions that are added, a parameter or a buffer, before two linear layers."""

    def __init__(self, buffer: bool) -> None:
        super().__init__()
        table = torch.randn(1, 64, 8)
        if buffer:
            self.register_buffer("table", table)
        else:
            self.table = nn.Parameter(table)
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x):
        return self.layers(x + self.table).mean(1)


def refused(model: nn.Module, x: torch.Tensor, budget: str, **options: object) -> str:
    with pytest.raises(InfeasibleBudget) as caught:
        quantkit.quantize(model.eval(), budget, x, progress=False, **options)
    return str(caught.value)


@pytest.mark.parametrize("buffer", [False, True], ids=["parameter", "buffer"])
@pytest.mark.parametrize("budget", ["25%", "file_size=1 KB"])
def test_a_table_is_named(buffer: bool, budget: str) -> None:
    said = refused(Table(buffer), torch.randn(64, 64, 8), budget)
    assert "The largest: table (2,048 bytes): no layer's weight" in said
    assert "narrower schemes do not help" in said


def test_a_layer_that_has_no_codes_is_named() -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.form, self.last = nn.Linear(8, 8), nn.Bilinear(8, 8, 32), nn.Linear(32, 3)

        def forward(self, x):
            return self.last(self.form(self.first(x).relu(), x))

    said = refused(Pairs(), torch.randn(64, 8), "9 bits")
    assert "The largest: form (8,192 bytes): bilinear is not supported" in said


@pytest.mark.parametrize(
    ("budget", "options", "named"),
    [
        ("7 bits", {"first_last": "8 bits"}, "0, 2 (192 bytes): w8a8 by first_last='8 bits'"),
        ("6.1 bits", {"rules": {"0": "w8a8"}}, "0 (96 bytes): w8a8 by rules"),
    ],
)
def test_layers_that_are_held_wide_are_named(budget: str, options: dict, named: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    said = refused(model, torch.randn(64, 8), budget, **options)
    assert "or for narrower schemes of layers that rules or first_last hold wide" in said
    assert f"The largest: {named}" in said
    least = said.partition("can be reached is ")[2].partition(". Ask")[0]
    assert quantkit.quantize(model.eval(), least, torch.randn(64, 8), progress=False, **options).plan.schemes


def test_narrower_schemes_are_advised_where_they_help() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    said = refused(model, torch.randn(64, 8), "6 bits", schemes=["w8a8"])
    assert said.endswith("Ask for at least that, or profile narrower schemes.")
