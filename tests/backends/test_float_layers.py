"""Layers that stay float between quantized ones: onnxruntime must not quantize them on its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quantkit.backends.onnxruntime.sessions import open_session
from quantkit.backends.onnxruntime.writer import export_onnx
from tests.backends.helpers import prepared, simulate
from tests.program.models import Net, randn

BATCH = ((randn(4, 3, 8, 8, seed=1),), {})


def chain() -> nn.Module:
    """Layers of the three kinds onnxruntime rounds by itself, each between two that are quantized."""

    def forward(self, x):
        x = F.relu(self.first(x))
        x = F.relu(self.middle(x))
        x = F.relu(self.up(F.relu(self.second(x))))
        x = F.relu(self.third(x)).mean((2, 3))
        return self.last(F.relu(self.inner(F.relu(self.outer(x)))))

    torch.manual_seed(0)
    return Net(
        forward,
        first=nn.Conv2d(3, 8, 3),
        middle=nn.Conv2d(8, 8, 3, padding=1, groups=2),
        second=nn.Conv2d(8, 6, 1),
        up=nn.ConvTranspose2d(6, 5, 2),
        third=nn.Conv2d(5, 8, 3),
        outer=nn.Linear(8, 12),
        inner=nn.Linear(12, 7),
        last=nn.Linear(7, 4),
    )


FLOAT = ("middle", "up", "inner")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    ready = prepared(chain(), BATCH, FLOAT)
    simulated = simulate(ready, BATCH, 8)
    path = tmp_path_factory.mktemp("float") / "model.onnx"
    export_onnx(simulated.eval(), BATCH, path)
    return simulated, path


def test_they_run_in_float(exported: tuple[nn.Module, Path], tmp_path: Path) -> None:
    open_session(exported[1], threads=1, save_optimized=tmp_path / "optimized.onnx")
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    kinds = {node.name.split("/")[0]: node.op_type for node in graph.node if "Conv" in node.op_type}
    assert {name: kinds.get(name) for name in ("first", "second", "third")} == dict.fromkeys(
        ("first", "second", "third"), "QLinearConv"
    )
    integers = {name for name, kind in kinds.items() if kind.startswith("QLinear")}
    assert not integers & set(FLOAT)
    weights = {str(t.name): t.data_type for t in graph.initializer}
    assert not any(
        name.startswith("/".join([layer, ""])) and "weight_q" in name for layer in FLOAT for name in weights
    )


def test_their_weights_are_not_rounded(exported: tuple[nn.Module, Path]) -> None:
    """A layer with one large weight loses all others to a scale for the whole tensor."""
    torch.manual_seed(0)
    model = chain()
    with torch.no_grad():
        model.middle.weight[0, 0, 0, 0] = 60.0
    ready = prepared(model, BATCH, FLOAT)
    simulated = simulate(ready, BATCH, 8).eval()
    path = exported[1].parent / "large.onnx"
    export_onnx(simulated, BATCH, path)
    session = open_session(path, threads=1)
    found = session.run(None, {session.get_inputs()[0].name: BATCH[0][0].numpy()})[0]
    with torch.no_grad():
        expected = simulated(*BATCH[0]).numpy()
    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)
