"""Tables of 4 bits in onnxruntime's own operator: what it computes, what it keeps in memory, and where it is used."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import quantkit
from quantkit.backends.onnxruntime.block_lookup import DOMAIN, block_size
from quantkit.backends.onnxruntime.marks import MarkedGraph, mark_graph
from quantkit.backends.onnxruntime.sessions import open_session, run_session
from quantkit.backends.onnxruntime.writer import ExportOptions, ExportReport, export_onnx
from quantkit.formats import Scheme, WeightFormat
from quantkit.rounding.weights import quantize_weight
from quantkit.simulation.model import SimulatedModel
from quantkit.targets import Target
from tests.backends.helpers import prepared

ROWS = 24
BATCH = ((torch.randint(0, ROWS, (3, 5), generator=torch.Generator().manual_seed(1)),), {})


class Table(nn.Module):
    """A table, also read by the head where that is tied to it."""

    def __init__(self, width: int, tied: bool = False) -> None:
        super().__init__()
        self.table, self.tied = nn.Embedding(ROWS, width), tied

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.table(ids)
        return nn.functional.linear(rows, self.table.weight) if self.tied else rows * 2


def format_of(scheme: str) -> WeightFormat:
    found = Scheme.parse(scheme).weight
    assert found is not None
    return found


def simulated(width: int, text: str, tied: bool = False) -> SimulatedModel:
    torch.manual_seed(0)
    ready, format = prepared(Table(width, tied).eval(), BATCH), format_of(text)
    codes = {
        name: quantize_weight(ready.weights[name].detach(), [format]).weights[format] for name in ready.quantizable
    }
    return SimulatedModel(ready.model, (), codes, {}, ready.weights)


@cache
def graph(width: int, tied: bool) -> MarkedGraph:
    """The marked graph of a network, which serves every format."""
    return mark_graph(simulated(width, "w4", tied), BATCH)


def exported(model: SimulatedModel, path: Path, domains: tuple[str, ...] = (DOMAIN,)) -> ExportReport:
    made: Table = model.model
    own = graph(made.table.embedding_dim, made.tied)
    return export_onnx(model, BATCH, path, ExportOptions(graph=own, domains=domains))


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize(
    ("width", "format"),
    [
        (64, "w4"),
        (64, "w4g32"),
        (64, "w4g16z"),
        (34, "w4"),
        (8, "w4"),
        (32, "w4g16z"),
        (64, "w4g32zsf32"),
        (64, "w4g16zsf8"),
    ],
    ids=str,
)
def test_rows_are_those_of_the_simulation_bit_for_bit(width: int, format: str, tmp_path: Path) -> None:
    model = simulated(width, format)
    own, plain = exported(model, tmp_path / "own.onnx"), exported(model, tmp_path / "plain.onnx", ())
    assert "GatherBlockQuantized" in operators(own.path)
    assert "Gather" not in operators(own.path)
    assert operators(own.path).count("Cast") == (format_of(format).scale != "f32")
    assert "Gather" in operators(plain.path)
    assert not [node for node in onnx.load(plain.path).graph.node if node.domain == DOMAIN]
    wanted = model(*BATCH[0]).detach().numpy()
    for path in (own.path, plain.path):
        for optimized in (False, True):
            assert np.array_equal(run_session(open_session(path, optimized=optimized), BATCH)[0], wanted)
    assert own.weight_bytes <= plain.weight_bytes
    assert own.minimum_runtime == plain.minimum_runtime == "1.23"


def test_a_table_stays_at_4_bits_in_memory(tmp_path: Path) -> None:
    path = exported(simulated(64, "w4g32"), tmp_path / "own.onnx").path
    open_session(path, save_optimized=tmp_path / "optimized.onnx")
    types = {
        t.data_type for t in onnx.load(tmp_path / "optimized.onnx").graph.initializer if tuple(t.dims) == (24, 32)
    }
    assert types == {onnx.TensorProto.UINT8}


@pytest.mark.parametrize(
    ("format", "tied"), [("w4g8", False), ("w8", False), ("w2g32", False), ("w3", False), ("w4", True)]
)
def test_other_tables_are_looked_up_by_standard_operators(format: str, tied: bool, tmp_path: Path) -> None:
    """Also one that is multiplied too: its codes are in memory as bytes then."""
    path = exported(simulated(64, format, tied), tmp_path / "m.onnx").path
    assert "GatherBlockQuantized" not in operators(path)


@pytest.mark.parametrize(
    ("width", "format", "block"),
    [
        (64, "w4", 64),
        (34, "w4", 64),
        (8, "w4", 16),
        (64, "w4g16", 16),
        (32, "w4g16z", 16),
        (96, "w4g48", None),
        (33, "w4", None),
        (64, "w4z", None),
        (48, "w4g16z", None),
    ],
)
def test_blocks_are_powers_of_two_from_16_and_rows_of_pairs(width: int, format: str, block: int | None) -> None:
    weight = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(0))
    found = format_of(format)
    assert block_size(quantize_weight(weight, [found]).weights[found]) == block


@pytest.mark.slow
def test_a_target_says_whether_files_may_have_it(tmp_path: Path) -> None:
    target = Target.load("onnxruntime-cpu")
    for domains in ((DOMAIN,), ()):
        result = quantkit.quantize(
            Table(64).eval(), "w4g32", [BATCH[0][0]], target=replace(target, operator_domains=domains), progress=False
        )
        path = result.export_onnx(tmp_path / "m.onnx").path
        assert ("GatherBlockQuantized" in operators(path)) == bool(domains)
