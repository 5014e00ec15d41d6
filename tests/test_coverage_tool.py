"""tools/coverage.py: a sample of its zoo, and what it says of networks that fail, end or take too long."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import onnx
import pytest
import torch
from onnx import helper
from torch import nn

import quantkit
from quantkit.program.outputs import results_of
from tools.zoo.entry import Entry, noise, run
from tools.zoo.every import ZOO
from tools.zoo.measure import failure, integer_kernels, measure, plain_export, stored_share
from tools.zoo.native import _nms
from tools.zoo.table import is_slow_refusal, markdown, summary, why

REPOSITORY = Path(__file__).resolve().parent.parent
# Layers of kinds that every version of the target runs on integers, by modules, functions and computed weights.
SAMPLE = "list_input weight_norm_parametrized transformers/poolformer".split()


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the tool prints in this process."""
    monkeypatch.syspath_prepend(REPOSITORY / "tools")
    main = import_module("tools.coverage").main

    def printed(*arguments: str) -> str:
        monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))  # the tool sets it
        monkeypatch.setattr(sys, "argv", ["coverage.py", *arguments])
        capsys.readouterr()
        assert main() == 0
        return capsys.readouterr().out

    return printed


def printed_by_a_process(*arguments: str) -> str:
    """What the tool prints as it is started by hand."""
    free = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(REPOSITORY / "tools" / "coverage.py"), *arguments]
    ran = subprocess.run(command, env=free, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.slow
def test_a_sample_is_quantized_exported_and_runs(tool: Callable[..., str], tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is absent: pip install quantkit[hf]")
    kept, table = tmp_path / "found.jsonl", tmp_path / "table.md"
    told = printed_by_a_process("--only", *SAMPLE, "--json", str(kept), "--markdown", str(table))
    found = {record["name"]: record for record in map(json.loads, kept.read_text().splitlines())}

    assert set(found) == set(SAMPLE), told
    for name, record in found.items():
        assert "failure" not in record, (name, record["failure"])
        assert record["share"] == 1.0, name
        assert record["error"] < 1e-4 and record["noise"] < 1e-4, name
        assert sum(record["kernels"].values()) > 0, name
        assert "batch" in record["sizes"], name
        assert f"| {name} | yes | yes | 100.0 % |" in table.read_text()
    assert f"{len(SAMPLE)} networks: quantized {len(SAMPLE)} (100.0 %), exported {len(SAMPLE)} (100.0 %)" in told

    before = kept.read_text()
    again = tool("--only", *SAMPLE, "--json", str(kept))
    assert kept.read_text() == before
    assert again.strip() == told[told.index(f"{len(SAMPLE)} networks") :].strip()


@pytest.mark.slow
def test_a_process_that_takes_too_long_is_ended(
    tool: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "found.jsonl"
    monkeypatch.setattr("tools.coverage.PRELOADED", [])  # for one network they take longer than it does
    tool("--only", "mlp", "--limit", "1", "--json", str(kept))
    assert json.loads(kept.read_text())["failure"]["type"] == "Timeout"


def test_the_zoo_is_large_and_its_names_are_listed(tool: Callable[..., str]) -> None:
    assert len(ZOO) >= 130
    assert {entry.family for entry in ZOO.values()} == {"plain", "transformers", "torchvision", "timm"}
    listed = tool("--list").split()
    assert sorted(listed) == sorted(ZOO)
    assert listed[0] == "mlp" and listed[-1].startswith("timm/")  # the quick ones first


@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if entry.family == "plain"])
def test_networks_are_the_same_at_every_call_and_answer(name: str) -> None:
    entry = ZOO[name]
    first, second = entry.model(), entry.model()
    assert not first.training
    for (key, one), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other), key
    with torch.no_grad():
        outputs = [x for x in results_of(run(first, entry.inputs(3, 0))) if x.is_floating_point()]
    for output in outputs:
        assert torch.isfinite(output).all() and output.std() > 0


class Parts(nn.Module):
    """A layer, the same weight again, a layer that stays float and a table that is only added."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.two.weight = self.one.weight
        self.table = nn.Parameter(torch.randn(1, 8))

    def forward(self, x):
        return self.head(torch.relu(self.two(torch.relu(self.one(x) + self.table))))


def test_the_share_counts_ties_once_and_leaves_added_tables_out() -> None:
    torch.manual_seed(0)
    model, inputs = Parts().eval(), noise(8)
    result = quantkit.quantize(model, "20 bits", [inputs(4, 0)], rules={"head": "float"}, progress=False)
    assert stored_share(result, inputs(4, 0)) == 64 / (64 + 32)


def test_kernels_are_counted_in_loops_too() -> None:
    def node(kind: str) -> onnx.NodeProto:
        return helper.make_node(kind, ["x"], ["y"])

    body = helper.make_graph([node("MatMulInteger"), node("Add")], "body", [], [])
    loop = helper.make_node("Loop", ["n"], ["z"], body=body)
    graph = helper.make_graph([node("QLinearConv"), node("QLinearConv"), node("Conv"), loop], "all", [], [])
    assert integer_kernels(helper.make_model(graph)) == {"MatMulInteger": 1, "QLinearConv": 2}


def test_a_failure_says_whether_it_was_meant() -> None:
    try:
        quantkit.quantize(nn.Linear(2, 2), "no budget")
    except quantkit.QuantkitError as error:
        found = failure(error)
    assert found["deliberate"] and "no budget" in found["line"]
    assert not failure(ValueError("first line\nsecond"))["deliberate"]
    assert failure(ValueError("first line\nsecond"))["line"] == "first line"


def test_what_fails_is_told_beside_what_the_exporter_of_torch_does() -> None:
    class Broken(nn.Module):
        def forward(self, x):
            if x.sum() > 0:
                return x.tanh()
            return x + 1

    def refused() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), Broken())

    told: dict = {}
    measure(Entry("broken", "plain", refused, noise(8), {}), "6 bits", told.update)
    assert told["quantized"] and "exported" not in told
    assert told["failure"]["type"] == "InvalidRequest" and told["plain"]["reached"] == "nothing"
    assert "torch.onnx: fails too" in why({"name": "broken", **told})
    assert plain_export(nn.Linear(8, 8).eval(), torch.zeros(2, 8)) == {"reached": "ran"}


def record(name: str, **more: object) -> dict:
    return {"name": name, "stage": "done", **more}


def test_the_summary() -> None:
    refusal = {"type": "InvalidRequest", "line": "No | yes", "deliberate": True, "place": "api.py:1"}
    raw = {"type": "KeyError", "line": "'x'", "deliberate": False, "place": "api.py:1"}
    good = {"quantized": True, "exported": True, "kernels": {"QGemm": 2}, "sizes": ["batch"]}
    records = [
        record("one", share=0.5, error=3e-2, noise=2e-2, undecided=0.25, **good),
        record("two", share=1.0, error=1e-7, **good),
        record("slow", stage="quantize", failure=refusal, quantize_seconds=7.0),
        record("raw", stage="quantize", failure=raw, quantize_seconds=7.0),
    ]
    assert summary(records) == [
        "4 networks: quantized 2 (50.0 %), exported 2 (50.0 %)",
        "share at 8 bits or fewer: median 75.0 %, least 50.0 %",
        "error of the file: median 1.5e-02, worst 3.0e-02",
        "errors above 2 %: 1 (one)",
        "raw errors: 1 (raw)",
        "refusals after more than 5 s: 1 (slow)",
    ]
    assert not is_slow_refusal(record("quick", failure=refusal, quantize_seconds=1.0))
    page = markdown(records)
    assert "| one | yes | yes | 50.0 % | 2 | batch | 3.0e-02 | 2.0e-02, 25 % undecided | 0 |" in page
    assert "| slow | quantize: InvalidRequest: No \\| yes |" in page
    assert "| raw | quantize: raw KeyError: 'x' (api.py:1) |" in page
    assert summary([]) == ["no network"]


def test_suppression_keeps_the_best_of_what_overlaps() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30], [0, 0, 10, 9]])
    assert _nms(boxes, torch.tensor([0.5, 0.9, 0.1, 0.4]), 0.6).tolist() == [1, 2]
    assert _nms(boxes, torch.tensor([0.5, 0.9, 0.1, 0.4]), 0.8).tolist() == [1, 0, 2]
