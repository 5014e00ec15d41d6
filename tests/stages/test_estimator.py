"""What sensitivity="auto" is: by the size of the work, and by whether the model has gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import quantkit
from quantkit.progress import one_call, said
from quantkit.stages import estimator as module
from quantkit.stages.request import make_ready

SCHEMES = ["w2", "w3", "w4", "w5", "w6", "w8"]


class Deep(nn.Sequential):
    def __init__(self, layers: int = 12) -> None:
        torch.manual_seed(0)
        super().__init__(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(layers)))


class Detached(Deep):
    """Its outputs have no gradient by anything."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


def x() -> Tensor:
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


def chosen(model: nn.Module) -> tuple[str, str]:
    """The estimator that "auto" is, and what was said."""
    with one_call():
        found = make_ready(model.eval(), x(), schemes=SCHEMES).settings["sensitivity"]
        return found, " ".join(said())


def test_small_work_is_measured() -> None:
    assert chosen(Deep()) == ("gram", chosen(Deep())[1]) and "sensitivity" not in chosen(Deep())[1]


def test_large_work_goes_by_gradients_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_MEASURED", 1e5)
    found, text = chosen(Deep())
    assert found == "fisher" and "sensitivity='fisher': what" in text and "'gram' takes 91" in text
    made = quantkit.profile(Deep().eval(), x(), schemes=SCHEMES, progress=False)
    assert made.provenance["sensitivity"] == "fisher" and made.provenance["whole_plans"] == 6


def test_a_model_without_gradients_is_measured_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_MEASURED", 1e5)
    found, text = chosen(Detached())
    assert found == "gram" and "cannot be differentiated" in text


def test_where_formats_are_few_measuring_is_cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_MEASURED", 0)
    request = make_ready(Deep(2).eval(), x(), schemes=["w4", "w8"])
    assert request.settings["sensitivity"] == "gram"


def test_an_estimator_that_was_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_MEASURED", 0)
    assert make_ready(Deep().eval(), x(), schemes=SCHEMES, sensitivity="gram").settings["sensitivity"] == "gram"
