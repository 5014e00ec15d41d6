"""Every kind of layer in a file: codes at their true size, and what is computed from them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from quantkit.backends.onnxruntime.marks import MarkedGraph, mark_graph
from quantkit.backends.onnxruntime.parity import OutputParity, Tolerance
from quantkit.backends.onnxruntime.sessions import open_session
from quantkit.backends.onnxruntime.writer import ExportOptions, export_onnx
from quantkit.formats import Scheme
from quantkit.program.inputs import Batch
from quantkit.ranges.activations import minmax_range
from quantkit.ranges.statistics import site_histograms
from quantkit.rounding.weights import quantize_weight
from quantkit.simulation.model import SimulatedModel
from quantkit.targets import Target
from quantkit.targets.instruction_sets import AVX2, detected_instruction_set
from quantkit.transforms.prepare import prepare, with_sites_of
from tests.backends.helpers import operations_that_run

BATCH = 3
EXACT = 1e-5  # relative, of the file as it is spelled


class Tied(nn.Module):
    """A table that is looked up, and read again by the head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(24, 8), nn.Linear(8, 8), nn.Linear(8, 24, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(F.gelu(self.body(self.table(ids))))


class TwoTables(nn.Module):
    """Tables added to each other, one of them looked up by positions of the code's own."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(24, 8), nn.Embedding(9, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids) + self.places(torch.arange(ids.shape[1])))


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(24, 8, mode="mean"), nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.bag(ids))


class Recurrent(nn.Module):
    """Two layers in both directions, and a step at a time of a cell."""

    def __init__(self, layer: type[nn.RNNBase], cell: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.layer = layer(6, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.cell, self.head = cell(16, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        steps, state = self.layer(x)[0], None
        for k in range(2):
            state = self.cell(steps[:, k], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Matrices(nn.Module):
    """Matrices with inputs first, as transformers' Conv1D holds them, experts in three dimensions, a bare F.linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bias = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8))
        self.second, self.experts = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(2, 8, 6))
        self.last = nn.Parameter(torch.randn(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x, self.first).relu() @ self.second
        return F.linear((y.unsqueeze(0) @ self.experts).sum(0), self.last)


class Turned(nn.Module):
    """Matrices that the model turns before it multiplies by them, one seen through a view, one split in two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Parameter(torch.randn(1, 5, 8))
        self.pair = nn.Parameter(torch.randn(2, 4, 5))

    def forward(self, x: Tensor) -> Tensor:
        y = (x @ self.first.weight.T + self.first.bias).relu()
        y = torch.mm(y, self.second.view(5, 8).t()).relu()
        return y @ self.pair[0].T + y @ self.pair[1].mT


class Standardized(nn.Module):
    """Weights that are computed each time: standardized, and a norm times a direction."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 2), weight_norm(nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight
        standard = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True)
        return self.head(F.conv2d(x, standard, self.conv.bias).relu().mean((2, 3)))


def ids() -> Tensor:
    return torch.randint(0, 24, (BATCH, 5), generator=torch.Generator().manual_seed(1))


def values(*shape: int) -> Tensor:
    return torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(1))


def transposed(d: int) -> nn.Module:
    """Transposed convolutions, in groups and not, behind a convolution whose output has codes."""
    conv, back = getattr(nn, f"Conv{d}d"), getattr(nn, f"ConvTranspose{d}d")
    return nn.Sequential(conv(2, 4, 1), nn.ReLU(), back(4, 6, 3, stride=2, groups=2), nn.ReLU(), back(6, 2, 2))


@dataclass(frozen=True)
class Case:
    model: nn.Module
    input: Tensor


def case(name: str) -> Case:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    made = {
        "tied": lambda: Case(Tied(), ids()),
        "tables": lambda: Case(TwoTables(), ids()),
        "bag": lambda: Case(Bag(), ids()),
        "lstm": lambda: Case(Recurrent(nn.LSTM, nn.LSTMCell), values(3, 6)),
        "gru": lambda: Case(Recurrent(nn.GRU, nn.GRUCell), values(3, 6)),
        "rnn": lambda: Case(Recurrent(nn.RNN, nn.RNNCell), values(3, 6)),
        "matrices": lambda: Case(Matrices(), values(6)),
        "turned": lambda: Case(Turned(), values(6)),
        "standardized": lambda: Case(Standardized(), values(3, 6, 6)),
        "encoder": lambda: Case(encoder, values(5, 8)),
        "transposed1d": lambda: Case(transposed(1), values(2, 7)),
        "transposed2d": lambda: Case(transposed(2), values(2, 4, 4)),
        "transposed3d": lambda: Case(transposed(3), values(2, 3, 3, 3)),
    }[name]()
    made.model.eval()
    return made


CASES = (
    "tied", "tables", "bag", "lstm", "gru", "rnn", "matrices", "turned", "standardized", "encoder",
    "transposed1d", "transposed2d", "transposed3d",
)  # fmt: skip


def simulated_at(found: Case, text: str, target: Target) -> SimulatedModel:
    """Every layer at one scheme, weights to nearest, sites by their extremes."""
    scheme, batch = Scheme.parse(text), ((found.input,), {})
    ready = prepare(found.model, [batch], target)
    ready = with_sites_of(ready, [layer.carried_out(scheme) for layer in ready.layers.values()])
    assert not [layer for layer in ready.layers.values() if layer.reason], "everything can be quantized"
    histograms = site_histograms(ready.model, ready.sites, [batch], False)
    ranges = {name: minmax_range(histogram, 8) for name, histogram in histograms.items()}
    simulated = SimulatedModel(ready.model, ready.sites, {}, ranges, ready.weights)
    assert scheme.weight is not None
    for name in ready.quantizable:
        made = quantize_weight(ready.weights[name].detach(), [scheme.weight])
        simulated.set_weight(name, made.weights[scheme.weight])
    return simulated


@cache
def graph_of(name: str) -> MarkedGraph:
    """The marked graph of a case, which serves every scheme."""
    found = case(name)
    return mark_graph(simulated_at(found, "w8a8", Target.load("onnxruntime-cpu")), ((found.input,), {}))


def exported(name: str, scheme: str, path: Path, instruction_set: str = AVX2) -> tuple[SimulatedModel, tuple]:
    found = case(name)
    simulated = simulated_at(found, scheme, Target.load(f"onnxruntime-cpu:{instruction_set}"))
    options = ExportOptions(instruction_set, graph=graph_of(name))
    report = export_onnx(simulated, ((found.input,), {}), path, options)
    return simulated, report.parity


def unoptimized(parity: tuple[OutputParity, ...]) -> list[OutputParity]:
    return [one for one in parity if not one.optimized]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scheme", ["w4", "w8a8", "w16"])
def test_computes_what_is_simulated(name: str, scheme: str, tmp_path: Path) -> None:
    _, parity = exported(name, scheme, tmp_path / "m.onnx", detected_instruction_set())
    limit = Tolerance.exact if scheme == "w8a8" else EXACT  # where activations have codes some of them tip over
    assert all(one.relative_error <= limit + 2 * one.rounding_noise for one in unoptimized(parity))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scheme", ["w3", "w8"])
def test_weights_take_their_true_size_once(name: str, scheme: str, tmp_path: Path) -> None:
    """Codes are there once, and in float there are only scales, biases and norms."""
    path = tmp_path / "m.onnx"
    simulated, _ = exported(name, scheme, path)
    tensors = onnx.load(path).graph.initializer
    codes = {f"{layer}.weight" for layer in simulated.weights}
    found = [t for t in tensors if t.name in codes or t.name.rpartition(".plane")[0] in codes]
    wanted = sum(w.format.storage_bytes(w.codes.shape) - 4 * w.scale.numel() for w in simulated.weights.values())
    assert sum(len(t.raw_data) for t in found) == wanted

    floats = sum(math.prod(t.dims) for t in tensors if t.data_type == onnx.TensorProto.FLOAT)
    scales = sum(w.scale.numel() for w in simulated.weights.values())
    vectors = sum(p.numel() for p in case(name).model.parameters() if p.dim() == 1)
    assert floats <= scales + vectors + 8


@pytest.mark.parametrize("name", ["tied", "tables", "matrices", "encoder", "standardized", "gru"])
@pytest.mark.parametrize("scheme", ["w4g2", "w3g2z", "w8z"])
def test_groups_and_zero_points(name: str, scheme: str, tmp_path: Path) -> None:
    _, parity = exported(name, scheme, tmp_path / "m.onnx")
    assert all(one.relative_error <= EXACT for one in parity)


@pytest.mark.parametrize("name", ["matrices", "encoder", "standardized"])
@pytest.mark.parametrize("instruction_set", ["avx2", "vnni"])
def test_turned_packed_and_computed_weights_run_on_integers(name: str, instruction_set: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    simulated, _ = exported(name, "w8a8", path, instruction_set)
    ran = Counter(operations_that_run(path, tmp_path))
    coded = [n for n in simulated.weights if simulated.floats.layers[n].reads_rows]
    packed = sum(n.endswith((".k", ".v")) for n in coded)  # computed together with their queries
    integers = sum(ran[op] for op in ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat"))
    assert integers >= len(coded) - packed


def test_a_matrix_that_the_model_turns_runs_on_integers_as_a_linear_layer_does(tmp_path: Path) -> None:
    exported("turned", "w8a8", tmp_path / "m.onnx")
    ran = Counter(operations_that_run(tmp_path / "m.onnx", tmp_path))
    assert ran["QGemm"] + ran["QLinearMatMul"] + ran["MatMulIntegerToFloat"] >= 1


def test_tables_stay_codes_in_memory(tmp_path: Path) -> None:
    """No operation of the optimized graph reads a table in float."""
    path, folder = tmp_path / "m.onnx", tmp_path / "optimized.onnx"
    exported("tables", "w8", path)
    open_session(path, save_optimized=folder)
    tables = [t for t in onnx.load(folder).graph.initializer if len(t.dims) == 2 and t.dims[0] in (9, 24)]
    wide = [t.name for t in tables if t.data_type == onnx.TensorProto.FLOAT and t.dims[1] > 1]
    assert tables and not wide


def test_a_layer_that_a_rule_keeps_float_among_packed_ones(tmp_path: Path) -> None:
    found = case("encoder")
    batch: Batch = ((found.input,), {})
    simulated = simulated_at(found, "w4", Target.load("onnxruntime-cpu"))
    packed = [name for name in simulated.weights if ".in_proj_weight." in name]
    without = {name: weight for name, weight in simulated.weights.items() if name != packed[0]}
    fresh = prepare(case("encoder").model, [batch], Target.load("onnxruntime-cpu"))
    part = SimulatedModel(fresh.model, (), without, {}, fresh.weights)
    report = export_onnx(part, batch, tmp_path / "m.onnx")
    assert all(one.relative_error <= EXACT for one in report.parity)
    assert report.weight_bytes < sum(4 * w.codes.numel() for w in simulated.weights.values())
