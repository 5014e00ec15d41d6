"""Scales of groups in 16 and 8 bits: as small in files as the format says, and the same values when they are run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import quantkit
from quantkit import Result
from quantkit.backends.onnxruntime.sessions import open_session, run_session
from quantkit.formats import Scheme

WIDTHS = {"f32": onnx.TensorProto.FLOAT, "f16": onnx.TensorProto.FLOAT16, "f8": onnx.TensorProto.FLOAT8E4M3FN}
WIDTHS |= {"i8": onnx.TensorProto.INT8}


class Looked(nn.Module):
    """A table of rows and a linear layer, both of which can have groups."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.line = nn.Embedding(40, 64), nn.Linear(64, 24)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.line(self.table(ids))


BATCHES = [torch.randint(0, 40, (4, 7), generator=torch.Generator().manual_seed(i)) for i in range(3)]


def quantized(scheme: str) -> Result:
    return quantkit.quantize(Looked().eval(), scheme, calibration=BATCHES, loss="mse", progress=False)


@pytest.mark.parametrize("scheme", ["w4g16", "w3g16z", "w2g32sf8", "w4g16zsf8", "w3g16si8", "w4g16sf32", "w8g64"])
def test_files_hold_scales_in_their_type_and_compute_the_same(scheme: str, tmp_path: Path) -> None:
    result, format = quantized(scheme), Scheme.parse(scheme).weight
    report = result.export_onnx(tmp_path / "m.onnx")
    stored = {t.name: t for t in onnx.load(report.path).graph.initializer}
    scales = [t for name, t in stored.items() if name.endswith(".weight.scale")]
    assert len(scales) == 2 and {t.data_type for t in scales} == {WIDTHS[format.scale]}
    assert sum(np.prod(t.dims) for t in scales) == format.scale_count((40, 64)) + format.scale_count((24, 64))
    wanted = result.model(BATCHES[0]).detach().numpy()
    for optimized in (False, True):
        session = open_session(report.path, optimized=optimized)
        assert np.allclose(run_session(session, ((BATCHES[0],), {}))[0], wanted, rtol=0, atol=2e-6)


def test_what_is_saved_is_what_was_quantized(tmp_path: Path) -> None:
    for scheme in ("w4g16", "w3g16zsf8", "w4g32si8"):
        result = quantized(scheme)
        result.save(tmp_path / scheme)
        again = quantkit.load(tmp_path / scheme, Looked().eval())
        assert torch.equal(again.model(BATCHES[0]), result.model(BATCHES[0]))
        assert torch.allclose(result.to_real().model(BATCHES[0]), result.model(BATCHES[0]), atol=1e-5)
        format = Scheme.parse(scheme).weight
        assert result.plan.size_bytes == sum(format.storage_bytes(shape) for shape in ((40, 64), (24, 64)))
