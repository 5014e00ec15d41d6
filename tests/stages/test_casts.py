"""Types that a model's own code names: halves are float32 throughout, what cannot be is refused at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quantkit
from quantkit.errors import InvalidRequest

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
QUICK = {"progress": False, "reconstruction": "none", "correction": None}


class Layers(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(F.relu(self.inward(x)))


class HalfPart(Layers):
    """A submodule in bfloat16, and casts around it."""

    def __init__(self) -> None:
        super().__init__()
        self.inward.bfloat16()

    def forward(self, x):
        return self.head(F.relu(self.inward(x.bfloat16())).float())


class HalfWeights(Layers):
    """Casts of float32 weights, by method and by name of the type."""

    def forward(self, x):
        weight, bias = self.inward.weight.bfloat16(), self.inward.bias.to(torch.bfloat16)
        return self.head(F.relu(F.linear(x.to(dtype=torch.bfloat16), weight, bias)).float())


class Decorated(Layers):
    """Autocast around the forward."""

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, x):
        return self.head(F.relu(self.inward(x)))


class Inside(Layers):
    """Autocast inside the forward."""

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = F.relu(self.inward(x))
        return self.head(y.float())


class SwitchedOff(Layers):
    """Autocast that is switched off."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.head(F.relu(self.inward(x)))


class DoublePart(Layers):
    """A submodule in float64, and casts around it."""

    def __init__(self) -> None:
        super().__init__()
        self.inward.double()

    def forward(self, x):
        return self.head(F.relu(self.inward(x.double())).float())


class DoubleByType(DoublePart):
    """The same by the type of its parameters."""

    def forward(self, x):
        return self.head(F.relu(self.inward(x.to(self.inward.weight.dtype))).to(self.head.weight.dtype))


CASES = [(make, scheme) for make in (HalfPart, SwitchedOff, DoubleByType) for scheme in ("w8a8", "w8")]


@pytest.mark.parametrize(("make", "scheme"), [*CASES, (HalfWeights, "w8a8")])
def test_casts_that_count_as_float32(make: type[Layers], scheme: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make().eval()
    result = quantkit.quantize(model, scheme, X, **QUICK)
    report = result.export_onnx(tmp_path / "model.onnx")
    assert all(found.relative_error <= 1e-5 for found in report.parity)
    wanted = model(X).float()
    assert (result.model(X) - wanted).norm() <= 0.03 * wanted.norm()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Decorated, r"^The model's own forward turns autocast on: inward/linear runs under it.*enabled=False"),
        (Inside, r"^The model's own forward turns autocast on: inward/linear runs under it.*enabled=False"),
        (DoublePart, r"^The model has parameters in float64 \(inward\.weight, inward\.bias\).*forward insists"),
    ],
)
def test_casts_that_are_refused_at_once(make: type[Layers], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        quantkit.quantize(make().eval(), "w8a8", X, **QUICK)


@pytest.mark.parametrize("scheme", ["w8a8", "w8"])
def test_a_result_takes_inputs_of_the_type_that_its_model_took(scheme: str) -> None:
    result = quantkit.quantize(Layers().double().eval(), scheme, X.double(), **QUICK)
    assert torch.equal(result.model(X.double()), result.model(X))
