"""Arguments of a model that are no tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import quantkit
from quantkit.program.inputs import split_batches, stacked

X = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))


class Optional(nn.Module):
    """Two linear layers, and arguments that a caller may leave out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, scale: Any = None, **more: Any) -> torch.Tensor:
        y = self.head(self.inner(x).relu())
        return y * scale if isinstance(scale, float | torch.Tensor) else y


ITEMS: dict[str, Any] = {
    "none": {"x": X[:48], "scale": None},
    "none in a tuple": (X[:48], None),
    "flag": {"x": X[:48], "return_dict": True},
    "number": (X[:48], 1.0),
    "text": {"x": X[:48], "mode": "abc"},
    "texts": {"x": X[:48], "names": ["a", "b"]},
}


def schemes(item: Any, budget: str) -> tuple[dict[str, str], float]:
    second = (X[48:], *item[1:]) if isinstance(item, tuple) else item | {"x": X[48:]}
    result = quantkit.quantize(Optional().eval(), budget, [item, second], reconstruction="none", progress=False)
    return {name: str(scheme) for name, scheme in result.plan.schemes.items()}, result.metrics["calibration_damage"]


@pytest.mark.parametrize("budget", ["w8a8", "7 bits"])
@pytest.mark.parametrize("item", ITEMS.values(), ids=ITEMS)
def test_arguments_that_are_no_tensors_change_nothing(item: Any, budget: str) -> None:
    wanted, damage = schemes((X[:48],), budget)
    found, other = schemes(item, budget)
    assert found == wanted
    assert other == pytest.approx(damage, rel=1e-4, abs=1e-9)


def test_a_number_as_a_tensor_is_taken() -> None:
    """What has no samples cannot be mixed with that of others: profiles measure on the inputs as they are then."""
    found, _ = schemes((X[:48], torch.tensor(1.0)), "7 bits")
    assert set(found) == {"inner", "head"}


def test_learning_takes_them_too() -> None:
    item = {"x": X, "scale": None, "return_dict": True}
    result = quantkit.quantize(Optional().eval(), "w3a8", [item], progress=False)
    assert "reconstruction" in result.notes


def test_batches_with_them_are_joined_and_split() -> None:
    batches = [((X[:4],), {"flag": True, "scale": None}), ((X[4:6],), {"flag": True, "scale": None})]
    joined = stacked(batches)
    assert joined is not None and torch.equal(joined[0][0], X[:6]) and joined[1] == {"flag": True, "scale": None}
    assert [len(args[0]) for args, _ in split_batches([joined], 4)] == [4, 2]
    assert stacked([batches[0], ((X[4:6],), {"flag": False, "scale": None})]) is None
    assert stacked([((X[:4], torch.tensor(2.0)), {})]) is None
