"""What a plan promises to take is what the tensors of its file take: no less than they do, and hardly more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn import functional as F

import quantkit
from quantkit.errors import InfeasibleBudget
from tests.program.models import randn
from tests.stages.networks import MobileNet, Small

QUICK = {"progress": False, "reconstruction": "none", "correction": None}


class Transformer(nn.Module):
    """Token embeddings, an encoder layer, a norm and a head."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, width)
        self.encoder = nn.TransformerEncoderLayer(width, 4, 96, batch_first=True, dropout=0.0)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, tokens):
        return self.head(self.norm(self.encoder(self.embedding(tokens))).mean(1))


class Decoder(nn.Module):
    """A transposed convolution that stays float, between two that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.outward = nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.Conv2d(24, 3, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 24, 4, stride=2, padding=1)

    def forward(self, x):
        return self.outward(F.relu(self.up(F.relu(self.inward(x)))))


class Recurrent(nn.Module):
    """A projection, an LSTM and a head on its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.lstm, self.head = nn.Linear(8, 16), nn.LSTM(16, 32, batch_first=True), nn.Linear(32, 5)

    def forward(self, x):
        return self.head(self.lstm(F.relu(self.project(x)))[0][:, -1])


class Perceptron(nn.Module):
    """Linear layers on vectors in two dimensions and in three, with a norm and without biases in places."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Sequential(nn.Linear(32, 64, bias=False), nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU())
        self.head = nn.Linear(64, 24)

    def forward(self, x):
        return self.head(self.rows(x)[:, 0])


NETWORKS = {
    "residual": (Small, randn(8, 2, 6, 6)),
    "depthwise": (MobileNet, randn(8, 3, 8, 8)),
    "transformer": (Transformer, torch.arange(96).reshape(8, 12) % 60),
    "decoder": (Decoder, randn(8, 3, 8, 8)),
    "recurrent": (Recurrent, randn(8, 7, 8)),
    "perceptron": (Perceptron, randn(8, 5, 32)),
}


def distinct(build: type[nn.Module]) -> nn.Module:
    """With no two tensors alike, as in a trained network: the exporter stores equal ones once."""
    torch.manual_seed(4)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def stored_bytes(path: Path) -> int:
    """Bytes of all tensors in a file, by nothing of quantkit."""
    graph = onnx.load(path).graph
    constants = [a.t for node in graph.node if node.op_type == "Constant" for a in node.attribute if a.name == "value"]
    return sum(_bytes(tensor) for tensor in (*graph.initializer, *constants))


def _bytes(tensor: onnx.TensorProto) -> int:
    packed = tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
    return -(-int(np.prod(tensor.dims)) // 2) if packed else numpy_helper.to_array(tensor).nbytes


def made(name: str, scheme: str) -> quantkit.Result:
    build, x = NETWORKS[name]
    return quantkit.quantize(distinct(build), scheme, x, **QUICK)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *((name, "w8a8") for name in ("residual", "transformer", "recurrent", "perceptron")),
        *((name, "w4") for name in ("depthwise", "recurrent")),
        *((name, "w8a8d") for name in ("recurrent", "perceptron")),
        *((name, "w3a6") for name in ("residual", "decoder")),
    ],
)
def test_the_promise_holds_in_the_file(name: str, scheme: str, tmp_path: Path) -> None:
    result = made(name, scheme)
    report = result.export_onnx(tmp_path / "model.onnx")
    counted, promised = stored_bytes(report.path), result.plan.total_bytes
    assert report.stored_bytes == counted
    assert counted <= promised <= 1.02 * counted + 128  # shapes of toys


def test_a_limit_on_size_is_kept_by_the_file(tmp_path: Path) -> None:
    """The tightest that is not refused: nothing but the plan's own count stands between it and the file."""
    model, x = distinct(Small), NETWORKS["residual"][1]
    with pytest.raises(InfeasibleBudget) as refused:
        quantkit.quantize(model, "1 B", x, **QUICK)
    limit = refused.value.smallest
    result = quantkit.quantize(model, f"{limit:g} B", x, **QUICK)
    result.export_onnx(tmp_path / "model.onnx")
    assert stored_bytes(tmp_path / "model.onnx") <= result.plan.total_bytes == limit


def test_halves_that_stay_float_are_counted_as_the_file_has_them(tmp_path: Path) -> None:
    model, x = distinct(Perceptron).half(), NETWORKS["perceptron"][1]
    result = quantkit.quantize(model, "w8a8", x, rules={"rows.2": "float"}, **QUICK)
    result.export_onnx(tmp_path / "model.onnx")
    counted = stored_bytes(tmp_path / "model.onnx")
    assert counted <= result.plan.total_bytes <= 1.02 * counted + 64
