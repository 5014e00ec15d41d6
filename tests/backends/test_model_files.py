"""A model in two files: what it computes, where it can be read from, and what is left where writing fails."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from quantkit.backends.onnxruntime import model_files
from quantkit.backends.onnxruntime.marks import MarkedGraph, mark_graph
from quantkit.backends.onnxruntime.model_files import PAGE, size_on_disk
from quantkit.backends.onnxruntime.sessions import open_session, run_session
from quantkit.backends.onnxruntime.writer import (
    ExportOptions,
    ExportReport,
    export_float,
    export_onnx,
    length_of,
)
from quantkit.errors import ParityError
from quantkit.program.inputs import Batch
from quantkit.simulation.model import SimulatedModel
from tests.backends.helpers import operations_that_run, prepared, simulate

WIDTH = 128
BATCH: Batch = ((torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(3)),), {})


@pytest.fixture(scope="module")
def simulated() -> SimulatedModel:
    """Layers of 8, 4 and 3 bits, and one in float."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(4)]).eval()
    return simulate(prepared(model, BATCH, ["3"]), BATCH, lambda position: (8, 4, 3)[position])


@pytest.fixture(scope="module")
def graph(simulated: SimulatedModel) -> MarkedGraph:
    return mark_graph(simulated, BATCH)


def write(simulated: SimulatedModel, graph: MarkedGraph, path: Path, external_data: bool) -> ExportReport:
    return export_onnx(simulated, BATCH, path, ExportOptions(graph=graph, external_data=external_data))


def outputs(path: Path) -> list[np.ndarray]:
    """As the file is spelled, and on integer kernels."""
    return [run_session(open_session(path, optimized=how), BATCH)[0] for how in (False, True)]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def same(ones: list[np.ndarray], others: list[np.ndarray]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(ones, others, strict=True))


def test_two_files_compute_what_one_does(simulated, graph, tmp_path: Path) -> None:
    one = write(simulated, graph, tmp_path / "one.onnx", False)
    two = write(simulated, graph, tmp_path / "two.onnx", True)
    assert names(tmp_path) == {"one.onnx", "two.onnx", "two.onnx.data"}
    assert same(outputs(one.path), outputs(two.path))
    assert (one.stored_bytes, one.weight_bytes) == (two.stored_bytes, two.weight_bytes)
    assert two.file_bytes == sum(path.stat().st_size for path in tmp_path.glob("two*")) == size_on_disk(two.path)
    assert (tmp_path / "two.onnx").stat().st_size < one.file_bytes / 5


def test_tensors_begin_at_pages_and_small_ones_stay_in_the_graph(simulated, graph, tmp_path: Path) -> None:
    path = write(simulated, graph, tmp_path / "model.onnx", True).path
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    apart = [{e.key: e.value for e in t.external_data} for t in tensors if t.data_location == t.EXTERNAL]
    assert {entry["location"] for entry in apart} == {"model.onnx.data"}
    assert all(int(entry["offset"]) % PAGE == 0 and int(entry["length"]) >= PAGE for entry in apart)
    # 16,384 weights of 8 bits, 4 bits, 2 of 3 bits, and in float; the plane of one bit is smaller than a page
    assert sorted(int(entry["length"]) for entry in apart) == [4096, 8192, 16384, 65536]


def test_they_run_from_elsewhere_and_where_they_are_moved(simulated, graph, tmp_path: Path, monkeypatch) -> None:
    made = tmp_path / "made"
    wanted = outputs(write(simulated, graph, made / "model.onnx", True).path)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert same(outputs(made / "model.onnx"), wanted)
    shutil.move(made, tmp_path / "moved")
    assert same(outputs(tmp_path / "moved" / "model.onnx"), wanted)
    assert same(outputs(Path("../moved/model.onnx")), wanted)


def test_a_model_that_one_file_cannot_hold_is_in_two(simulated, graph, tmp_path: Path, monkeypatch) -> None:
    one = write(simulated, graph, tmp_path / "one.onnx", False)
    assert length_of(simulated, graph, ExportOptions()) == one.file_bytes
    monkeypatch.setattr(model_files, "LARGEST_FILE", one.file_bytes - 1)
    two = write(simulated, graph, tmp_path / "model.onnx", False)
    floating = export_float(simulated, BATCH, tmp_path / "float.onnx", graph=graph)
    assert names(tmp_path) == {"one.onnx", *(f"{n}.onnx{end}" for n in ("model", "float") for end in ("", ".data"))}
    assert same(outputs(one.path), outputs(two.path))
    assert length_of(simulated, graph, ExportOptions()) == two.file_bytes
    assert size_on_disk(floating) > 4 * 4 * WIDTH**2
    assert operations_that_run(two.path, tmp_path) == operations_that_run(one.path, tmp_path)


@pytest.mark.parametrize("external_data", [False, True])
def test_data_of_an_earlier_file_do_not_stay(external_data: bool, simulated, graph, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    wanted = outputs(write(simulated, graph, path, external_data).path)
    write(simulated, graph, path, not external_data)
    assert names(tmp_path) == ({"model.onnx"} if external_data else {"model.onnx", "model.onnx.data"})
    assert same(outputs(path), wanted)


def test_files_that_differ_leave_the_earlier_ones(simulated, graph, tmp_path: Path) -> None:
    path = write(simulated, graph, tmp_path / "model.onnx", True).path
    before = {one.name: one.read_bytes() for one in tmp_path.iterdir()}
    other = copy.deepcopy(simulated)
    with torch.no_grad():
        other.model[3].bias += 9
    with pytest.raises(ParityError):
        write(other, graph, path, True)
    assert {one.name: one.read_bytes() for one in tmp_path.iterdir()} == before
