"""Weights of floating-point numbers in ONNX files: onnxruntime's CPU provider reads the same values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import quantkit
from quantkit.backends.onnxruntime.sessions import open_session, run_session
from quantkit.formats import Scheme

TYPES = {"wfp8": onnx.TensorProto.FLOAT8E4M3FN, "wfp8e5m2": onnx.TensorProto.FLOAT8E5M2}


class Network(nn.Module):
    """A table, a convolution and a linear layer, each with a multiple of 32 inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.conv, self.line = nn.Embedding(30, 32), nn.Conv1d(32, 8, 2), nn.Linear(8 * 6, 64)
        self.last = nn.Linear(64, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.conv(self.table(ids).transpose(1, 2)).relu()
        return self.last(self.line(rows.flatten(1)).relu())


BATCH = torch.randint(0, 30, (4, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scheme", ["wfp8", "wfp8e5m2", "wfp8g8", "wnvfp4", "wmxfp4"])
def test_files_compute_what_the_simulation_does(scheme: str, tmp_path: Path) -> None:
    format = Scheme.parse(scheme).weight
    rules = {"line": "float"} if 48 % (format.group or 1) else {}
    result = quantkit.quantize(Network().eval(), scheme, [BATCH], loss="mse", rules=rules, progress=False)
    report = result.export_onnx(tmp_path / "m.onnx")
    stored = {t.name: t for t in onnx.load(report.path).graph.initializer}
    expected = TYPES.get(scheme, onnx.TensorProto.FLOAT8E4M3FN if format.bits == 8 else onnx.TensorProto.INT4)
    coded = [name for name, one in result.plan.schemes.items() if not one.is_float]
    assert {"table", "conv", "last"} <= set(coded)
    assert {stored[f"{name}.weight"].data_type for name in coded} == {expected}
    wanted = result.model(BATCH).detach().numpy()
    for optimized in (False, True):
        session = open_session(report.path, optimized=optimized)
        assert np.allclose(run_session(session, ((BATCH,), {}))[0], wanted, rtol=1e-5, atol=2e-6)
    real = result.to_real()
    assert torch.allclose(real.model(BATCH), result.model(BATCH), atol=1e-6)


def test_saved_numbers_come_back(tmp_path: Path) -> None:
    result = quantkit.quantize(Network().eval(), "wfp8", [BATCH], loss="mse", progress=False)
    result.save(tmp_path)
    assert torch.equal(quantkit.load(tmp_path, Network().eval()).model(BATCH), result.model(BATCH))
    assert result.plan.size_bytes == sum(
        scheme.weight.storage_bytes(result.simulated().floats.layers[name].shape)
        for name, scheme in result.plan.schemes.items()
    )


def test_formats_can_be_candidates_beside_each_other() -> None:
    result = quantkit.quantize(
        Network().eval(), "5 bits", [BATCH], schemes=["wmxfp4", "wfp8", "w4g16", "w8"], loss="mse",
        rules={"line": ["wnvfp4", "w4g16", "wfp8"]}, reconstruction="none", progress=False,
    )  # fmt: skip
    assert result.plan.average_bits <= 5
