"""Models that cannot be seen into, in whole or in part, are refused at once, by name; unusual ones that can work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quantkit
from quantkit.errors import InvalidRequest

X = torch.randn(32, 8)


class Around(nn.Module):
    """Two linear layers around a part."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.inward, self.part, self.head = nn.Linear(8, 8), part, nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.part(F.relu(self.inward(x))))


class Spread(nn.Module):
    """Multiplies by a sparse buffer or parameter."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        matrix = torch.eye(8).to_sparse_csr() if learned else torch.eye(8).to_sparse()
        if learned:
            self.matrix = nn.Parameter(matrix, requires_grad=False)
        else:
            self.register_buffer("matrix", matrix)

    def forward(self, x):
        return torch.sparse.mm(self.matrix, x.T).T


def fake_quantize() -> nn.Module:
    return torch.ao.quantization.FakeQuantize(quant_min=0, quant_max=255)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.jit.script(nn.Sequential(nn.Linear(8, 8))), r"^The model's part went through torch\.jit"),
        (lambda: torch.compile(nn.Linear(8, 8)), r"^The model's part went through torch\.compile"),
        (lambda: Spread(False), r"^The tensor 'part\.matrix' of the model has the layout sparse_coo.*to_dense"),
        (lambda: Spread(True), r"^The tensor 'part\.matrix' of the model has the layout sparse_csr.*to_dense"),
        (
            fake_quantize,
            r"^The model's part is a torch\.ao\.quantization\.fake_quantize\..*the float model",
        ),
        (torch.ao.quantization.MinMaxObserver, r"^The model's part is a torch\.ao\.quantization\.observer"),
    ],
)
def test_a_part_that_hides_something_is_named(make, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        quantkit.quantize(Around(make()).eval(), "w8a8", X, progress=False)


@pytest.mark.parametrize("part", [torch.ao.quantization.QuantStub(), nn.Identity()])
def test_stubs_of_models_that_torch_could_quantize_are_no_quantization(part: nn.Module) -> None:
    assert quantkit.quantize(Around(part).eval(), "w8a8", X, progress=False).plan.schemes


class Empty(nn.Module):
    """A layer without outputs, and one without inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.none, self.nothing, self.head = nn.Linear(8, 0), nn.Linear(0, 4), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(x) + self.nothing(self.none(x))


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_layers_without_weights_are_no_layers(tmp_path: Path) -> None:
    result = quantkit.quantize(Empty().eval(), "w8a8", X, progress=False)
    assert list(result.plan.schemes) == ["head"]
    result.export_onnx(tmp_path / "model.onnx")


class Force(nn.Module):
    """What a network of potentials returns: the gradient of its energy."""

    def __init__(self, convolution: bool) -> None:
        super().__init__()
        layer = nn.Conv1d(1, 4, 3) if convolution else nn.Linear(8, 16)
        self.energy = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(24 if convolution else 16, 1))
        self.convolution = convolution

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            energy = self.energy(x.unsqueeze(1) if self.convolution else x).sum()
            return torch.autograd.grad(energy, x)[0]


@pytest.mark.parametrize("convolution", [False, True])
def test_gradients_inside_a_forward(convolution: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Force(convolution).eval()
    result = quantkit.quantize(model, "w8a8", X, progress=False)
    wanted = model(X)
    assert (result.model(X) - wanted).norm() <= 0.1 * wanted.norm()
    with pytest.raises(InvalidRequest, match=r"cannot be exported to ONNX\. Its forward takes gradients"):
        result.export_onnx(tmp_path / "model.onnx")


class Projected(nn.Module):
    """A recurrence with projections."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.head = nn.LSTM(8, 8, proj_size=4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.memory(x)[0][:, -1])


def test_projections_of_an_lstm_are_refused_before_a_file_is_written(tmp_path: Path) -> None:
    result = quantkit.quantize(Projected().eval(), "w8", torch.randn(16, 5, 8), progress=False)
    with pytest.raises(InvalidRequest, match="'memory' is an LSTM with proj_size=4"):
        result.export_onnx(tmp_path / "model.onnx")
