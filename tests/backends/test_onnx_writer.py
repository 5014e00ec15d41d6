"""What an exported file looks like, which models it takes, and that it runs on integers."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantkit.backends.onnxruntime.latency import measure_latency_ratio
from quantkit.backends.onnxruntime.marks import mark_graph
from quantkit.backends.onnxruntime.parity import Tolerance
from quantkit.backends.onnxruntime.sessions import open_session
from quantkit.backends.onnxruntime.writer import ExportOptions, ExportReport, export_float, export_onnx
from quantkit.errors import InvalidRequest, ParityError
from quantkit.numbers.uniform import SiteRange
from quantkit.plan import Plan
from quantkit.program.inputs import Batch
from quantkit.simulation.model import SimulatedModel
from quantkit.targets.instruction_sets import detected_instruction_set
from tests.backends.helpers import initializers, operations_that_run, prepared, simulate
from tests.backends.models import (
    BothRanks,
    ConvTwice,
    InPlace,
    LinearTwice,
    OneBatchSize,
    Residual,
    TwoInputs,
    Undecided,
)
from tests.program.models import Net

PLAN = Plan.of({"conv1": "w3a8"})


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def quantized(model: nn.Module, batch: Batch, bits=4, keep_float=()) -> SimulatedModel:
    torch.manual_seed(0)
    return simulate(prepared(model.eval(), batch, keep_float), batch, bits)


@pytest.fixture(scope="module")
def residual() -> tuple[SimulatedModel, Batch]:
    torch.manual_seed(0)
    batch: Batch = ((randn(8, 3, 12, 12),), {})
    return quantized(Residual(), batch, lambda position: (8, 3, 4, 2)[position], ["head"]), batch


@pytest.fixture(scope="module")
def files(residual, tmp_path_factory) -> tuple[ExportReport, Path]:
    simulated, batch = residual
    folder = tmp_path_factory.mktemp("residual")
    graph = mark_graph(simulated, batch)
    report = export_onnx(
        simulated, batch, folder / "model.onnx", ExportOptions(detected_instruction_set(), plan=PLAN, graph=graph)
    )
    return report, export_float(simulated, batch, folder / "float.onnx", graph=graph)


def test_residual_network_stays_on_codes(files, tmp_path: Path) -> None:
    ran = operations_that_run(files[0].path, tmp_path)
    assert ran.count("QLinearConv") == 4
    assert ran.count("QLinearAdd") == 2
    between = ran[ran.index("QLinearConv") : len(ran) - ran[::-1].index("QLinearAdd")]
    assert not {"QuantizeLinear", "DequantizeLinear", "Conv", "Add"} & set(between)


def test_float_file_holds_the_same_network(files, residual) -> None:
    simulated, batch = residual
    model = onnx.load(files[1])
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in model.graph.node}
    assert files[0].file_bytes < files[1].stat().st_size
    found = open_session(files[1]).run(None, {"image": batch[0][0].numpy()})[0]
    with torch.no_grad():
        assert np.allclose(found, simulated.model(*batch[0]).numpy(), atol=1e-5)


def test_names_follow_the_modules(files) -> None:
    model = onnx.load(files[0].path)
    assert [value.name for value in model.graph.input] == ["image"]
    assert [value.name for value in model.graph.output] == ["output"]
    found = initializers(files[0].path)
    expected = {"stem.0.weight", "conv1.weight.plane2", "conv1.weight.plane1", "conv1.weight.scale", "conv2.weight",
                "conv1.bias", "conv1.bias.scale", "down.weight.plane2", "head.weight", "head.bias", "offset",
                "input.scale", "input.zero_point"}  # fmt: skip
    assert expected <= set(found)
    assert {"stem.0/Conv", "conv1/Conv", "down/Conv", "pool/MaxPool", "head/Gemm"} <= {
        n.name for n in model.graph.node
    }
    assert not [n for n in found if re.search("val_|^model|symbolic|node_", n)]


def test_nothing_of_the_exporter_is_left(files) -> None:
    model = onnx.load(files[0].path)
    assert model.producer_name == "quantkit"
    assert not model.graph.value_info
    for thing in (*model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output, model.graph):
        assert not thing.doc_string
        assert not thing.metadata_props
    assert b"pkg.torch" not in files[0].path.read_bytes()


def test_versions_and_plan_are_recorded(files) -> None:
    model = onnx.load(files[0].path)
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 21, "quantkit": 1}
    assert model.ir_version == 10
    recorded = {entry.key: entry.value for entry in model.metadata_props}
    assert recorded == {"quantkit.plan": PLAN.digest(), "quantkit.minimum_onnxruntime": "1.23"}


def test_tensors_are_raw_and_shared(files) -> None:
    model = onnx.load(files[0].path)
    assert all(tensor.raw_data for tensor in model.graph.initializer)
    names = [tensor.name for tensor in model.graph.initializer]
    assert len(names) == len(set(names))
    zeros = [t for t in model.graph.initializer if t.name.endswith("zero_point")]
    assert all(len(t.dims) == t.name.endswith(".weight_zero_point") for t in zeros)


@pytest.mark.parametrize("count", [1, 5])
def test_any_batch_size(files, residual, count: int) -> None:
    x = residual[1][0][0][:count]
    with torch.no_grad():
        wanted = residual[0](x).numpy()
    assert files[0].dynamic_batch
    assert np.allclose(
        open_session(files[0].path).run(None, {"image": x.numpy()})[0], wanted, atol=0.02 * np.ptp(wanted)
    )


def test_two_inputs_and_a_dict(tmp_path: Path) -> None:
    batch: Batch = ((randn(6, 2, 8, 8),), {"features": randn(6, 5)})
    report = export_onnx(quantized(TwoInputs(), batch), batch, tmp_path / "two.onnx")
    graph = onnx.load(report.path).graph
    assert [value.name for value in graph.input] == ["image", "features"]
    assert [value.name for value in graph.output] == ["mixed", "parts.0", "parts.1"]
    assert [value.type.tensor_type.shape.dim[0].dim_param for value in (*graph.input, *graph.output)] == ["batch"] * 5


@pytest.mark.parametrize("kind", [ConvTwice, LinearTwice], ids=["conv", "linear"])
def test_a_layer_called_twice_is_stored_once(kind: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    # enough rows that one code on a tie, which float sums may tip, is little
    batch: Batch = ((randn(4, 4, 9, 9) if kind is ConvTwice else randn(64, 6),), {})
    report = export_onnx(quantized(model, batch), batch, tmp_path / "twice.onnx")
    names = [name for name in initializers(report.path) if name.startswith(("layer.weight", "layer.bias"))]
    biases = ["layer.bias", "layer.bias.1", "layer.bias.scale", "layer.bias.scale.1"]
    assert sorted(names) == [*biases, "layer.weight", "layer.weight.scale", "layer.weight_zero_point"]
    ran = operations_that_run(report.path, tmp_path)
    assert ran.count("QLinearConv") + ran.count("QGemm") == 2


def test_a_layer_on_vectors_and_on_sequences_keeps_both_right(tmp_path: Path) -> None:
    batch: Batch = ((randn(4, 3, 6),), {})
    report = export_onnx(quantized(BothRanks(), batch, 3), batch, tmp_path / "both.onnx")
    assert sum(name.startswith("layer.weight.plane2") for name in initializers(report.path)) == 1, "stored once"
    assert {"QGemm", "MatMulIntegerToFloat"} <= set(operations_that_run(report.path, tmp_path))


def test_in_place_operations(tmp_path: Path) -> None:
    batch: Batch = ((randn(4, 3, 9, 9),), {})
    report = export_onnx(quantized(InPlace(), batch, 8), batch, tmp_path / "inplace.onnx")
    ran = operations_that_run(report.path, tmp_path)
    assert ran.count("QLinearConv") == 2
    assert ran.count("QLinearAdd") == 1


def test_float_activations_fold_to_a_float_weight(tmp_path: Path) -> None:
    batch: Batch = ((randn(4, 4, 9, 9),), {})
    simulated = quantized(ConvTwice(), batch, 3)
    weight_only = SimulatedModel(simulated.model, simulated.sites, simulated.weights, {})
    report = export_onnx(
        weight_only, batch, tmp_path / "w3.onnx", ExportOptions(tolerance=Tolerance(exact=1e-5, optimized=1e-5))
    )
    ran = operations_that_run(report.path, tmp_path)
    assert ran.count("Mul") == 1  # the model's own
    assert not {"DequantizeLinear", "Cast", "QuantizeLinear"} & set(ran)


def test_one_batch_size_only_is_said(tmp_path: Path, caplog) -> None:
    batch: Batch = ((randn(4, 2, 3),), {})
    with caplog.at_level(logging.INFO, logger="quantkit"):
        report = export_onnx(SimulatedModel(OneBatchSize(), [], {}, {}), batch, tmp_path / "fixed.onnx")
    assert not report.dynamic_batch
    assert "batches of 4 only" in caplog.text
    assert onnx.load(report.path).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 4


def branch(self, x):
    y = self.a(x)
    return self.b(y * 2 if len(x) > 8 else y)


def scaled(self, x):
    return self.b(self.a(x) * (2.0 if x.shape[0] > 8 else 1.0))


def loop(self, x):
    return torch.stack([self.b(F.relu(self.a(x[i]))) for i in range(x.shape[0])])


@pytest.mark.parametrize(("forward", "count"), [(branch, 12), (scaled, 12), (loop, 12), (loop, 2)])
def test_models_that_look_at_the_number_of_samples_take_one(
    forward: Callable[..., Tensor], count: int, tmp_path: Path, caplog
) -> None:
    """Files are traced on two samples, where these take another path or stop early."""
    torch.manual_seed(0)
    model = Net(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 3)).eval()
    with caplog.at_level(logging.INFO, logger="quantkit"):
        report = export_onnx(SimulatedModel(model, [], {}, {}), ((randn(count, 6),), {}), tmp_path / "fixed.onnx")
    assert not report.dynamic_batch
    assert f"batches of {count} only" in caplog.text


def test_a_model_that_cannot_be_followed(tmp_path: Path) -> None:
    batch: Batch = ((randn(4, 6).abs(),), {})
    with pytest.raises(
        InvalidRequest,
        match=r"cannot be exported to ONNX\. Its forward must not choose its operations by.*\(torch.export: \w+: ",
    ):
        export_onnx(quantized(Undecided(), batch), batch, tmp_path / "no.onnx")
    assert not list(tmp_path.iterdir())


def test_formats_without_a_form_are_refused(residual, tmp_path: Path) -> None:
    simulated, batch = residual
    name = simulated.sites[0].name
    ranges = simulated.ranges | {name: SiteRange(0.1, 3, bits=16)}
    wide = SimulatedModel(simulated.model, simulated.sites, simulated.weights, ranges)
    with pytest.raises(InvalidRequest, match=f"Site '{name}' has 16-bit codes"):
        export_onnx(wide, batch, tmp_path / "no.onnx")


def test_a_file_that_differs_is_not_left_behind(residual, tmp_path: Path) -> None:
    simulated, batch = residual
    graph = mark_graph(simulated, batch)
    changed = copy.deepcopy(simulated)
    with torch.no_grad():
        changed.model.offset += 2
    with pytest.raises(
        ParityError, match=r"'output' in onnxruntime without optimization differs by \d\d\.\d+%.*larger tolerance"
    ):
        export_onnx(changed, batch, tmp_path / "wrong.onnx", ExportOptions(graph=graph))
    assert not list(tmp_path.iterdir())


def test_latency_is_measured_in_turns(files, residual) -> None:
    found = measure_latency_ratio(files[1], files[0].path, residual[1], rounds=5)
    assert found.float_ms > 0
    assert found.quantized_ms > 0
    assert 0.01 < found.ratio < 100
