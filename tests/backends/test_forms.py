"""Every weight width through every kind of layer: exact as spelled, on integer kernels when run, at true size in the
file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quantkit.backends.onnxruntime.marks import MarkedGraph, mark_graph
from quantkit.backends.onnxruntime.sessions import open_session
from quantkit.backends.onnxruntime.writer import ExportOptions, ExportReport, export_onnx
from quantkit.formats import WeightFormat
from quantkit.numbers.packed_weight import pack_weight
from quantkit.program.inputs import Batch
from quantkit.simulation.model import SimulatedModel
from quantkit.targets.instruction_sets import AVX2, VNNI, detected_instruction_set
from tests.backends.helpers import initializers, operations_that_run, packed_bytes_of, prepared, simulate, stored_bytes

LAYERS = ("conv", "depthwise", "grouped", "conv1d", "tokens", "head")
WIDTHS = range(2, 9)
UNSIGNED = "8 unsigned"  # for CPUs without VNNI, exact on every other too
HAS_VNNI = detected_instruction_set() == VNNI


class EveryKind(nn.Module):
    """Convolutions (plain, depthwise, grouped, 1-D), a Linear on sequences and one on vectors; odd sizes, so planes
    pad."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.grouped = nn.Conv2d(6, 10, 3, groups=2)
        self.conv1d = nn.Conv1d(10, 7, 3, padding=1)
        self.tokens = nn.Linear(7, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        y = F.relu(self.conv(x))
        y = F.relu(self.grouped(F.relu(self.depthwise(y))))
        tokens = self.tokens(self.conv1d(y.flatten(2)).transpose(1, 2))
        return {"tokens": tokens, "head": self.head(tokens.mean(1))}


@dataclass
class Exported:
    bits: int
    signed: bool
    simulated: SimulatedModel
    report: ExportReport
    batch: Batch


@pytest.fixture(scope="module")
def batch() -> Batch:
    return (torch.randn(16, 3, 13, 13, generator=torch.Generator().manual_seed(1)),), {}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return EveryKind().eval()


@pytest.fixture(scope="module")
def graph(model: nn.Module, batch: Batch) -> MarkedGraph:
    return mark_graph(simulate(prepared(model, batch), batch, 8), batch)


@pytest.fixture(scope="module", params=[*WIDTHS, UNSIGNED] if HAS_VNNI else WIDTHS, ids="w{}".format)
def exported(request, model: nn.Module, batch: Batch, tmp_path_factory) -> Exported:
    signed = request.param == 4 or (request.param == 8 and HAS_VNNI)
    bits = 8 if request.param == UNSIGNED else request.param
    simulated = simulate(prepared(model, batch), batch, bits)
    path = tmp_path_factory.mktemp("forms") / "model.onnx"
    instruction_set = AVX2 if request.param == UNSIGNED else detected_instruction_set()
    report = export_onnx(simulated, batch, path, ExportOptions(instruction_set))
    return Exported(bits, signed, simulated, report, batch)


def test_as_spelled_outputs_differ_by_float_sums_only(exported: Exported) -> None:
    session = open_session(exported.report.path, optimized=False)
    (x,), _ = exported.batch
    with torch.no_grad():
        wanted = exported.simulated(x)
    found = dict(zip(("tokens", "head"), session.run(None, {"x": x.numpy()}), strict=True))
    for name, value in wanted.items():
        assert np.mean(np.abs(found[name] - value.numpy()) > 1e-5) < 0.02, (
            name
        )  # a sum on a tie tips a code now and then


def test_runs_on_integer_kernels_only(exported: Exported, tmp_path: Path) -> None:
    ran = operations_that_run(exported.report.path, tmp_path)
    assert ran.count("QLinearConv") == 4
    assert ran.count("MatMulIntegerToFloat") == ran.count("QGemm") == 1
    assert not {"Conv", "Gemm", "MatMul", "BitShift", "BitwiseAnd", f"Unpack{exported.bits}"} & set(ran)


def test_integer_kernels_agree(exported: Exported) -> None:
    assert all(p.relative_error < 0.02 for p in exported.report.parity if p.optimized)


def test_codes_in_the_file_are_the_plans_bytes(exported: Exported) -> None:
    for layer in LAYERS:
        weight = exported.simulated.weights[layer]
        codes = weight.codes
        if exported.signed:  # ONNX's own signed types: the sign bit is flipped against the unsigned planes
            codes = codes ^ torch.tensor(-(1 << exported.bits - 1), dtype=torch.int8)
        assert stored_bytes(exported.report.path, layer) == packed_bytes_of(codes, exported.bits), layer


def test_weight_bytes_are_the_plans(exported: Exported) -> None:
    planned = sum(pack_weight(weight).nbytes for weight in exported.simulated.weights.values())
    assert exported.report.weight_bytes == planned
    assert planned == sum(
        WeightFormat(str(exported.bits)).storage_bytes(w.codes.shape) for w in exported.simulated.weights.values()
    )


def test_scales_are_the_simulated_ones(exported: Exported) -> None:
    found = initializers(exported.report.path)
    for layer in LAYERS:
        scale = np.frombuffer(found[f"{layer}.weight.scale"].raw_data, np.float32)
        assert np.array_equal(scale, exported.simulated.weights[layer].scale.numpy().reshape(-1)), layer


def test_full_range_codes_are_exact_on_every_cpu(tmp_path: Path) -> None:
    """Largest weights on largest inputs: sums of two products that 16 bits cannot hold."""
    model = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.Flatten(), nn.Linear(128, 4, bias=False)).eval()
    for layer in (model[0], model[2]):
        layer.weight.data = torch.full_like(layer.weight, 0.5)
    batch: Batch = (torch.ones(4, 8, 4, 4),), {}
    options = ExportOptions(detected_instruction_set())
    report = export_onnx(simulate(prepared(model, batch), batch, 8), batch, tmp_path / "model.onnx", options)
    assert all(p.relative_error < 0.01 for p in report.parity if p.optimized)
