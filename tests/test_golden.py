"""The golden record names what differs between two checkouts, and nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from tools import golden
from tools.golden import Comparison, Run, differences, main
from tools.golden_run import codes_of, counted, divergence, graph_of

RUN = "digits-latency"


def record(**changed: Any) -> dict[str, Any]:
    """A record of nothing in particular."""
    base: dict[str, Any] = {
        "plan": {"conv": "w4a8", "fc": "w8a8", "site input": "a8"},
        "codes": {"conv": "01", "fc": "02", "site input": "03"},
        "graph": {"computation": "04", "Conv": 1},
        "forwards": {"quantize": "7 calls, 70 samples"},
        "kl": 1e-3, "cpu_s": 10.0, "work_s": 8.0, "result_mb": 300.0, "peak_mb": 400.0,
    }  # fmt: skip
    return base | changed


def test_equal_records_do_not_differ() -> None:
    assert differences(record(), record(kl=2e-3, cpu_s=99.0, peak_mb=1.0)) == {}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"plan": {"conv": "w3a8", "fc": "w8a8", "site input": "a8"}}, {"plan": ["conv w4a8 -> w3a8"]}),
        ({"plan": {"conv": "w4a8", "fc": "w8a8"}}, {"plan": ["site input a8 -> absent"]}),
        ({"codes": record()["codes"] | {"new": "05"}}, {"codes": ["new absent -> 05"]}),
        (
            {"graph": {"computation": "06", "Conv": 2}, "forwards": {"quantize": "6 calls, 60 samples"}},
            {
                "graph": ["computation 04 -> 06", "Conv 1 -> 2"],
                "forwards": ["quantize 7 calls, 70 samples -> 6 calls, 60 samples"],
            },
        ),
    ],
    ids=["a scheme", "a site less", "a weight more", "graph and forwards"],
)
def test_differences_are_named(changed: dict[str, Any], expected: dict[str, list[str]]) -> None:
    assert differences(record(), record(**changed)) == expected


def test_ratios_are_medians_of_rounds() -> None:
    before = [record(cpu_s=cpu) for cpu in (10.0, 20.0, 10.0)]
    after = [record(cpu_s=cpu) for cpu in (11.0, 24.0, 30.0)]
    assert Comparison(before, after).ratio("cpu_s") == pytest.approx(1.2)


def test_rounds_that_disagree_are_told() -> None:
    other = record(codes=record()["codes"] | {"fc": "22"})
    found = Comparison([record(), record()], [record(), other]).problems
    assert found == {"codes between rounds after": ["fc 02 -> 22"]}


@pytest.mark.parametrize(
    ("after", "code", "said"),
    [
        (record(cpu_s=20.0), 0, "1 of 1 runs equal"),
        (record(plan={"conv": "w3a8"}), 1, f"{RUN}: different: plan"),
        ({"failed": "KeyError: 'x'"}, 1, "failed: after: KeyError: 'x'"),
        ({"skipped": "no data"}, 1, "skipped, no data"),
    ],
    ids=["equal", "plan", "failed", "skipped"],
)
def test_comparing_two_checkouts(
    after: dict[str, Any], code: int, said: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    asked = []

    def carried_out(run: Run, checkout: Path) -> dict[str, Any]:
        asked.append(checkout)
        return record() if checkout == tmp_path else after

    monkeypatch.setattr(golden, "carried_out", carried_out)
    (tmp_path / "quantkit").mkdir()
    (tmp_path / "quantkit" / "__init__.py").touch()
    written = tmp_path / "all.json"
    assert main(["--against", str(tmp_path), "--rounds", "2", "--only", RUN, "--json", str(written)]) == code
    assert said in capsys.readouterr().out
    here = golden.REPOSITORY
    if "skipped" not in after:
        assert asked == [tmp_path, here, here, tmp_path], "the checkouts take turns"
    shown = json.loads(written.read_text())
    if "cpu_s" in after:
        assert shown["geometric means"]["cpu_s"] == pytest.approx(after["cpu_s"] / 10)


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["--against", str(tmp_path)])
    assert "is no checkout of quantkit" in capsys.readouterr().err


def test_every_run_can_be_asked_to_round_alike(monkeypatch: Any) -> None:
    asked = []

    def carried_out(run: Run, checkout: Path) -> dict[str, Any]:
        asked.append(run.options)
        return record()

    monkeypatch.setattr(golden, "carried_out", carried_out)
    assert main(["--only", RUN, "vit-repquant", "--rounding", "nearest"]) == 0
    assert asked == [golden.RUNS[name].options | {"rounding": "nearest"} for name in (RUN, "vit-repquant")]


def test_runs_are_listed(capsys: Any) -> None:
    assert main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(golden.RUNS)


@dataclass
class Old:
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None


@dataclass
class New:
    codes: Tensor
    scales: Tensor
    zero_points: Tensor


@dataclass
class Site:
    scale: float | Tensor
    zero_point: int
    bits: int = 8


@dataclass
class Computed:
    scale: float
    bits: int = 4

    def codes(self, x: Tensor) -> Tensor:
        return x / self.scale


def test_codes_are_compared_by_value_not_by_type() -> None:
    codes, scale = torch.tensor([[1, -2], [3, 4]], dtype=torch.int8), torch.tensor([[0.5], [0.1]])
    zeros, same = torch.zeros(2, 1, dtype=torch.int8), codes_of(Old(codes, scale))
    assert same == codes_of(New(codes.long(), scale.flatten(), zeros))
    assert (
        len({same, codes_of(Old(-codes, scale)), codes_of(Old(codes, scale * 2)), codes_of(Old(codes.T, scale))}) == 4
    )
    assert codes_of(Old(codes, scale, zeros + 1)) not in (same, codes_of(Old(codes, scale, zeros + 2)))
    assert codes_of(Site(0.1, 3)) == codes_of(Site(torch.tensor(0.1), 3))
    assert len({codes_of(Site(0.1, 3)), codes_of(Site(0.1, 4)), codes_of(Site(0.1, 3, 4))}) == 3
    assert len({codes_of(Computed(0.1)), codes_of(Computed(0.2)), codes_of(Computed(0.1, 3))}) == 3
    with pytest.raises(ValueError, match="teach codes_of its names"):
        codes_of(object())


def graph_file(path: Path, names: str, order: tuple[int, ...], weight: float, size: int | str = "n") -> Path:
    """relu(x w) + x w^2: inner names and the order of nodes as given."""
    x, w, a, r, b = names
    x = "x"
    nodes = [
        helper.make_node("Mul", [x, w], [a]),
        helper.make_node("Relu", [a], [r]),
        helper.make_node("Mul", [a, w], [b]),
        helper.make_node("Add", [r, b], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [size, 2]) for name in (x, "y")]
    constant = numpy_helper.from_array(np.full(2, weight, np.float32), w)
    graph = helper.make_graph([nodes[k] for k in order], "g", ends[:1], ends[1:], [constant])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), path)
    return path


def test_graphs_are_compared_by_what_they_compute(tmp_path: Path) -> None:
    path = tmp_path / "g.onnx"
    same = graph_of(graph_file(path, "xwarb", (0, 1, 2, 3), 2.0))
    assert same == graph_of(graph_file(path, "xvcde", (0, 2, 1, 3), 2.0, "batch"))
    assert {key: count for key, count in same.items() if key != "computation"} == {"Add": 1, "Mul": 2, "Relu": 1}
    assert same != graph_of(graph_file(path, "xwarb", (0, 1, 2, 3), 2.5)), "another constant"
    assert same != graph_of(graph_file(path, "xwarb", (0, 1, 2, 3), 2.0, 4)), "one batch size only"


def test_forwards_of_one_class_are_counted() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    with counted(nn.Linear) as forwards:
        model(torch.ones(5, 2))
        model(torch.ones(4, 2))
        forwards.close("first")
        model[0](torch.ones(3, 2))
        forwards.close("second")
    model(torch.ones(5, 2))
    assert forwards.phases == {"first": "2 calls, 9 samples", "second": "1 calls, 3 samples"}
    assert forwards.calls == 0


def test_divergence_is_that_of_torch() -> None:
    wanted, found = torch.randn(6, 4), torch.randn(6, 4)
    expected = nn.functional.kl_div(found.log_softmax(-1), wanted.softmax(-1), reduction="batchmean")
    assert divergence(wanted, found) == pytest.approx(float(expected), rel=1e-4)
    assert divergence(wanted, wanted) == pytest.approx(0, abs=1e-12)


@pytest.mark.slow
def test_a_run_gives_its_record(tmp_path: Path) -> None:
    written = tmp_path / "all.json"
    assert main(["--only", RUN, "--json", str(written)]) == 0
    found = json.loads(written.read_text())[RUN]
    layers = [name for name, scheme in found["plan"].items() if name[:5] != "site " and scheme != "float"]
    assert 0 < len(layers) == sum(not name.startswith("site ") for name in found["codes"])
    assert {name for name in found["plan"] if name.startswith("site ")} == set(found["codes"]) - set(layers)
    assert "float" in found["plan"].values(), "some layer is too slow on codes"
    assert found["graph"]["Conv"] > 0
    assert found["forwards"]["quantize"].split()[0] != "0"
    assert 0 < found["kl"] < 0.01
    assert found["kl"] == pytest.approx(found["metrics"]["calibration_damage"], rel=0.02)
    assert found["cpu_s"] > found["work_s"] > 0
    assert 0 < found["result_mb"] <= found["peak_mb"]
