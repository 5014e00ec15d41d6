"""Activations of 4 to 7 bits: codes clipped in bytes, exact as spelled, on the same integer kernels as 8 bits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch

from quantkit.backends.onnxruntime.sessions import open_session
from quantkit.backends.onnxruntime.writer import ExportReport, export_onnx
from quantkit.program.inputs import Batch
from tests.backends.helpers import operations_that_run, prepared, simulate
from tests.backends.models import Residual


@pytest.fixture(scope="module")
def batch() -> Batch:
    return (torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(1)),), {}


@pytest.fixture(scope="module")
def exported(batch: Batch, tmp_path_factory) -> dict[int, ExportReport]:
    torch.manual_seed(0)
    ready = prepared(Residual().eval(), batch)
    folder = tmp_path_factory.mktemp("sites")
    return {bits: export_onnx(simulate(ready, batch, 4, bits), batch, folder / f"{bits}.onnx") for bits in (4, 6, 8)}


@pytest.mark.parametrize("bits", [4, 6])
def test_narrow_activations_run_on_the_kernels_of_bytes(
    bits: int, exported: dict[int, ExportReport], tmp_path: Path
) -> None:
    wide = Counter(operations_that_run(exported[8].path, tmp_path))
    narrow = Counter(operations_that_run(exported[bits].path, tmp_path))
    assert wide["QLinearConv"] == narrow["QLinearConv"] == 4
    assert wide["QLinearAdd"] == narrow["QLinearAdd"] == 2
    assert set(narrow) - set(wide) == {"Clip"}


@pytest.mark.parametrize("bits", [4, 6])
def test_the_file_computes_what_was_simulated(bits: int, exported: dict[int, ExportReport]) -> None:
    spelled = next(found for found in exported[bits].parity if not found.optimized)
    assert spelled.relative_error <= 1e-5 + 2 * spelled.rounding_noise
    assert all(found.relative_error < 0.05 for found in exported[bits].parity)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_no_code_of_a_site_passes_its_highest(
    bits: int, exported: dict[int, ExportReport], batch: Batch, tmp_path: Path
) -> None:
    """Every quantized tensor of the file, made an output."""
    model = onnx.load(exported[bits].path)
    made = [node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"]
    codes = {node.input[0] for node in model.graph.node if node.output[0] in made} - {
        tensor.name for tensor in model.graph.initializer
    }
    sites = {node.output[0] for node in model.graph.node if node.op_type in ("QuantizeLinear", "Clip")} & codes
    model.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.UINT8, None) for n in sites)
    onnx.save(model, tmp_path / "open.onnx")
    session = open_session(tmp_path / "open.onnx", optimized=False)
    found = session.run(sorted(sites), {session.get_inputs()[0].name: batch[0][0].numpy()})
    assert len(sites) >= 8
    assert max(int(values.max()) for values in found) == (1 << bits) - 1
