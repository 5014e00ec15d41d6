"""Measuring what a network takes on this machine, and quantizing within a limit on it: structure, never times."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import quantkit
from quantkit.errors import InfeasibleBudget, InvalidRequest
from quantkit.plan.latency import LatencyTable, OperationTime, SiteTime
from quantkit.plan.operations import execute
from quantkit.stages.bench import bench, mixtures_of
from quantkit.targets import Target
from tests.stages.networks import images, small

LAYERS = ("stem.0", "conv", "mix", "head")


@pytest.fixture(scope="module")
def measured() -> Target:
    return bench(small(), images(), batch=4, seconds=0, progress=False)


def with_times(target: Target, operation: Callable[[str], OperationTime], site: SiteTime) -> Target:
    """The target with times by hand: what is found on them depends on no machine."""
    table = target.latency
    assert table is not None
    operations = {name: operation(name) for name in table.operations}
    made = replace(table, rest_ns=1000, operations=operations, sites=dict.fromkeys(table.sites, site))
    return replace(target, latency=made)


@pytest.fixture(scope="module")
def by_hand(measured: Target) -> Target:
    """Convolutions are three times as fast on codes, but the stem, which is slower; conversions cost something."""

    def times(name: str) -> OperationTime:
        return OperationTime(9000, 12000, 14000) if name == "stem.0" else OperationTime(9000, 3000, 4000)

    return with_times(measured, times, SiteTime(0, 0, 500, 500))


@pytest.mark.slow
def test_every_part_of_the_network_has_its_time(measured: Target, tmp_path: Path) -> None:
    table = measured.latency
    assert isinstance(table, LatencyTable)
    assert set(table.operations) == {*LAYERS, "/add"}
    assert set(table.sites) == {"input", "stem.2", "/relu", "mix", "/relu.1", "/mean"}
    assert all(min(t.float_ns, t.integer_ns, t.wide_ns) > 0 for n, t in table.operations.items() if n != "/add")
    assert table.operations["/add"].integer_ns > 0
    assert any(time.quantize_ns > 0 for time in table.sites.values())
    assert any(time.dequantize_ns > 0 for time in table.sites.values())
    assert (table.threads, table.batch) == (1, 4)
    assert {"host", "date", "onnxruntime", "torch", "quantkit", "rounds", "clock"} <= set(table.notes)
    assert Target.load(measured.save(tmp_path / "target.yaml")) == measured


@pytest.mark.slow
def test_a_plan_keeps_its_limit_and_its_file_runs(by_hand: Target, tmp_path: Path) -> None:
    path = by_hand.save(tmp_path / "target.yaml")
    result = quantkit.quantize(small(), "latency=65%, 10 bits", images(), target=path, progress=False)
    plan, table = result.plan, by_hand.latency
    quantized = [name for name, scheme in plan.schemes.items() if not scheme.is_float]
    wide = [name for name in quantized if plan.schemes[name].weight.bits == 8]
    assert result.profile is not None and table is not None
    assert result.profile.latency == table
    taken = table.predict(execute(result.profile.operations, quantized, wide))
    assert taken == plan.provenance["latency_ns"] <= 0.65 * table.float_ns
    assert plan.average_bits <= 10
    assert plan.schemes["stem.0"].is_float, "slower on codes, and small"
    assert set(plan.sites) == {site.name for site in result.quantized.sites}
    report = result.export_onnx(tmp_path / "model.onnx")
    assert report.path.exists()


@pytest.mark.slow
@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_effort_keeps_the_limit_too(by_hand: Target, effort: str) -> None:
    result = quantkit.quantize(
        small(), "latency=70%, 8 bits", images(), target=by_hand, effort=effort, schemes=["w3a8", "w8a8"],
        progress=False,
    )  # fmt: skip
    assert result.plan.average_bits <= 8
    assert result.plan.provenance["latency_ratio"] <= 0.7


@pytest.mark.slow
def test_a_limit_out_of_reach_is_refused_before_anything_is_measured(by_hand: Target, monkeypatch) -> None:
    monkeypatch.setattr("quantkit.stages.quantize.measure", lambda *a, **k: pytest.fail("measured"))
    with pytest.raises(
        InfeasibleBudget, match=r"No plan has latency 10%: the smallest that can be reached is [\d.]+%"
    ):
        quantkit.quantize(small(), "latency=10%", images(), target=by_hand, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("schemes", [["w4", "w8"], ["w4a4", "w8a8"]])
def test_formats_without_times_are_no_candidates(by_hand: Target, schemes: list[str]) -> None:
    profile = quantkit.profile(small(), images(), target=by_hand, schemes=schemes, progress=False)
    if "w8a8" in schemes:
        assert len(quantkit.pareto(profile, limit="latency")) > 1
        return
    for ask in (lambda: quantkit.allocate(profile, "latency=80%"), lambda: quantkit.pareto(profile, limit="latency")):
        with pytest.raises(InvalidRequest, match=r"met with 8-bit activations so far.*Add a scheme such as 'w4a8'"):
            ask()


@pytest.mark.slow
def test_a_table_of_another_network_is_refused(by_hand: Target) -> None:
    other = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(InvalidRequest, match=r"measured on another model: it has no time for the layer '0'"):
        quantkit.profile(other, images(), target=by_hand, progress=False)
    wider = small()
    wider.mix, wider.conv = nn.Conv2d(20, 12, 1), nn.Conv2d(12, 20, 3, padding=1)
    with pytest.raises(InvalidRequest, match="the same layer names and other shapes"):
        quantkit.profile(wider, images(), target=by_hand, progress=False)


@pytest.mark.slow
def test_the_least_time_is_found_under_a_limit_on_accuracy(by_hand: Target) -> None:
    def agreement(model: nn.Module) -> float:
        with torch.no_grad():
            return float(
                (model(images(40, seed=8)).argmax(-1) == small()(images(40, seed=8)).argmax(-1)).float().mean()
            )

    result = quantkit.quantize(
        small(), "accuracy_drop=0.5, minimize=latency", images(), target=by_hand, evaluate=agreement,
        schemes=["w4a8", "w8a8"], progress=False,
    )  # fmt: skip
    assert result.metrics["float"] - result.metrics["quantized"] <= 0.5
    assert result.plan.provenance["latency_ratio"] < 1


@pytest.mark.parametrize("changes", [{"threads": 0}, {"batch": 0}])
def test_counts_below_one_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(InvalidRequest, match=r"(threads|batch)=0: at least 1"):
        bench(small(), images(), **changes)


def test_mixtures_show_every_layer_in_every_way() -> None:
    layers = [f"layer{k}" for k in range(12)]
    mixtures = mixtures_of(layers, (6, 8), seed=0)
    assert len({tuple(m.items()) for m in mixtures}) == len(mixtures)
    for name in layers:
        assert {m.get(name) for m in mixtures} == {None, 6, 8}
    neighbours = {(m.get(one), m.get(other)) for m in mixtures for one, other in itertools.pairwise(layers)}
    assert len(neighbours) == 9
    assert mixtures == mixtures_of(layers, (6, 8), seed=0)
