"""A file is made for the CPUs that its target names, and is the same wherever it is written."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from torch import nn

import quantkit
import quantkit.stages.result
import quantkit.targets
from quantkit import Result
from quantkit.backends.onnxruntime import writer
from quantkit.backends.onnxruntime.editing import copy_tidy
from quantkit.backends.onnxruntime.marks import MarkedGraph, mark_graph
from quantkit.targets.instruction_sets import AVX2, VNNI
from tests.backends.helpers import prepared, simulate
from tests.program.models import Net, randn
from tests.stages.networks import images, small

NAME = "onnxruntime-cpu"
PLAN = {"stem.0": "w8a8", "conv": "w3a8", "mix": "w8a8", "head": "w4a8"}


pytestmark = pytest.mark.slow


def run_on(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend to be on a machine of this kind."""
    for module in (quantkit.targets, quantkit.stages.result):
        monkeypatch.setattr(module, "detected_instruction_set", lambda: machine)


def applied(plan: object = PLAN, target: str = NAME) -> Result:
    return quantkit.apply(
        small(), plan, images(), target=target, rounding="nearest", reconstruction="none", correction=None,
        progress=False,
    )  # fmt: skip


def written(result: Result, path: Path) -> bytes:
    return result.export_onnx(path, example=images()).path.read_bytes()


@pytest.fixture(scope="module")
def graph() -> MarkedGraph:
    return mark_graph(applied().simulated(), ((images(),), {}))


@pytest.fixture(autouse=True)
def one_graph(graph: MarkedGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    """All results here are of one float model, which is exported once, as this takes seconds."""
    monkeypatch.setattr(writer, "mark_graph", lambda simulated, example, sizes: graph)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The file for each instruction set, written on this machine, from a graph each."""
    folder = tmp_path_factory.mktemp("files")
    return {one: written(applied(target=f"{NAME}:{one}"), folder / f"{one}.onnx") for one in (AVX2, VNNI)}


def stored_type(data: bytes, layer: str) -> int:
    graph = onnx.load_from_string(data).graph
    return next(tensor.data_type for tensor in graph.initializer if tensor.name == f"{layer}.weight")


def test_only_full_bytes_depend_on_it(files: dict[str, bytes]) -> None:
    types = {one: [stored_type(data, layer) for layer in ("stem.0", "mix", "head")] for one, data in files.items()}
    assert types == {
        AVX2: [onnx.TensorProto.UINT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT4],
        VNNI: [onnx.TensorProto.INT8, onnx.TensorProto.INT8, onnx.TensorProto.INT4],
    }


@pytest.mark.parametrize("machine", [AVX2, VNNI])
@pytest.mark.parametrize("wanted", [AVX2, VNNI])
def test_the_machine_does_not_matter_where_the_target_names_it(
    wanted: str, machine: str, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_on(machine, monkeypatch)
    result = applied(target=f"{NAME}:{wanted}")
    assert result.plan.provenance["instruction_set"] == wanted
    assert written(result, tmp_path / "model.onnx") == files[wanted]


@pytest.mark.parametrize("machine", [AVX2, VNNI])
def test_a_default_target_is_for_the_machine_that_decided(
    machine: str, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_on(machine, monkeypatch)
    result = applied()
    result.save(tmp_path)
    run_on(VNNI if machine == AVX2 else AVX2, monkeypatch)  # and everything that follows is for that one
    assert written(result, tmp_path / "a.onnx") == files[machine]
    assert written(quantkit.load(tmp_path, small()), tmp_path / "b.onnx") == files[machine]
    assert written(applied(quantkit.Plan.load(tmp_path / "plan.json")), tmp_path / "c.onnx") == files[machine]


def test_constants_keep_the_order_of_the_graph() -> None:
    """Also those that no module names, whatever addresses they have."""

    def forward(self, x):
        y = self.fc(x)
        return y[:, 1:3] * 3.5 + y[:, 2:4] / 1.7 - y[:, 3:5].clamp(-0.3, 0.4) + y[:, 4:6] ** 1.3

    batch = ((randn(4, 8),), {})
    ready = prepared(Net(forward, fc=nn.Linear(8, 8)), batch)
    marked = mark_graph(simulate(ready, batch, 8), batch)
    orders = [list(copy_tidy(marked).graph.initializers) for _ in range(8)]
    assert len(orders[0]) > 6
    assert orders == orders[:1] * 8


def test_a_plan_of_an_earlier_version_is_written_for_this_machine(
    files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = applied()
    del result.plan.provenance["instruction_set"]
    run_on(AVX2, monkeypatch)
    assert written(result, tmp_path / "model.onnx") == files[AVX2]
