"""Weights in float16: the model with numpy's rounded weights is what is simulated, stored, loaded and run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import quantkit
from quantkit.backends.onnxruntime.sessions import open_session
from quantkit.errors import InvalidRequest
from tests.backends.helpers import initializers, operations_that_run
from tests.backends.test_promised_bytes import NETWORKS, QUICK, Perceptron, distinct, stored_bytes
from tests.program.models import randn

F16 = onnx.TensorProto.FLOAT16
ROWS = NETWORKS["perceptron"][1]


def perceptron() -> nn.Module:
    return distinct(Perceptron)


def beyond() -> nn.Module:
    """With one weight that float16 cannot hold, in the middle layer."""
    model = perceptron()
    with torch.no_grad():
        model.rows[2].weight[3, 4] = 70000.0
    return model


def twin(model: nn.Module, layers: list[str] | None = None) -> nn.Module:
    """A copy with its matrices (default: all) rounded by numpy."""
    found = copy.deepcopy(model)
    for name, parameter in found.named_parameters():
        wanted = parameter.dim() > 1 if layers is None else name in [f"{layer}.weight" for layer in layers]
        if wanted:
            parameter.data = torch.from_numpy(parameter.detach().numpy().astype(np.float16).astype(np.float32))
    return found


def run(path: Path, x: Tensor) -> Tensor:
    return torch.from_numpy(open_session(path).run(None, {open_session(path).get_inputs()[0].name: x.numpy()})[0])


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


@pytest.mark.parametrize("name", ["transformer", "decoder", "recurrent"])
def test_every_kind_of_layer_is_stored_in_two_bytes_and_computes_in_float(name: str, tmp_path: Path) -> None:
    model, x = distinct(NETWORKS[name][0]), NETWORKS[name][1]
    result = quantkit.quantize(model, "w16", x, **QUICK)
    assert {str(scheme) for scheme in result.plan.schemes.values()} == {"w16"}
    assert result.plan.average_bits == 16 and not result.plan.sites
    assert result.plan.size_bytes == sum(2 * p.numel() for p in model.parameters() if p.dim() > 1)
    wanted = outputs(twin(model), x)
    assert torch.equal(outputs(result.model, x), wanted)

    report = result.export_onnx(tmp_path / "model.onnx")
    torch.testing.assert_close(run(report.path, x), wanted, rtol=1e-5, atol=1e-6)
    counted = stored_bytes(report.path)
    assert counted <= result.plan.total_bytes <= 1.02 * counted + 128
    halves = [t for t in initializers(report.path).values() if t.data_type == F16]
    assert sum(2 * int(np.prod(t.dims)) for t in halves) == result.plan.size_bytes
    # the casts of whole weights are carried out when the file is loaded
    assert operations_that_run(report.path, tmp_path).count("Cast") == (1 if name == "transformer" else 0)


class Tied(nn.Module):
    """A table that is looked up twice, and read by a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(40, 16), nn.Linear(16, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(self.table(tokens) + self.table(tokens.flip(1)))


def test_a_table_that_is_read_three_times_is_stored_once_and_looked_up_in_float16(tmp_path: Path) -> None:
    model, x = distinct(Tied), torch.arange(24).reshape(4, 6)
    result = quantkit.quantize(model, "w16", x, **QUICK)
    report = result.export_onnx(tmp_path / "model.onnx")
    table = [t for t in initializers(report.path).values() if 40 in t.dims]
    assert [(t.data_type, tuple(t.dims)) for t in table] == [(F16, (40, 16))]
    assert result.plan.size_bytes == report.weight_bytes == 40 * 16 * 2
    torch.testing.assert_close(run(report.path, x), outputs(twin(model), x), rtol=1e-5, atol=1e-6)
    graph = onnx.load(report.path).graph
    kinds = {t.name: t.data_type for t in graph.initializer}
    assert [kinds[node.input[0]] for node in graph.node if node.op_type == "Gather" and "table" in node.name] == [
        F16
    ] * 2


def test_a_rule_leaves_the_rest_as_it_would_be_with_a_float_layer(tmp_path: Path) -> None:
    model = perceptron()
    result = quantkit.quantize(model, "w8a8", ROWS, rules={"head": "w16"}, **QUICK)
    beside = quantkit.quantize(model, "w8a8", ROWS, rules={"head": "float"}, **QUICK)
    assert {n: str(s) for n, s in result.plan.schemes.items()} == {"rows.0": "w8a8", "rows.2": "w8a8", "head": "w16"}
    assert result.plan.sites == beside.plan.sites
    assert beside.plan.total_bytes - result.plan.total_bytes == 2 * model.head.weight.numel()
    assert "3,072 weights in float16" in str(result.plan)
    assert torch.equal(result.quantized.floats["head"], twin(model).head.weight)
    report = result.export_onnx(tmp_path / "model.onnx")
    assert stored_bytes(report.path) <= result.plan.total_bytes <= 1.02 * stored_bytes(report.path) + 64


def test_part_of_a_packed_parameter_is_float16_beside_codes(tmp_path: Path) -> None:
    model, x = distinct(NETWORKS["transformer"][0]), NETWORKS["transformer"][1]
    query = "encoder.self_attn.in_proj_weight.q"
    result = quantkit.quantize(model, "w8a8", x, rules={query: "w16", "embedding": "w16"}, **QUICK)
    report = result.export_onnx(tmp_path / "model.onnx")
    assert initializers(report.path)[f"{query}.weight"].data_type == F16
    assert stored_bytes(report.path) <= result.plan.total_bytes


def test_the_solver_takes_it_where_it_is_worth_its_bytes(tmp_path: Path) -> None:
    model = perceptron()
    result = quantkit.quantize(model, "8 bits", ROWS, schemes=["w2a8", "w16"], **QUICK)
    schemes = {str(scheme) for scheme in result.plan.schemes.values()}
    assert schemes == {"w2a8", "w16"} and result.plan.average_bits <= 8
    profile = result.profile
    assert profile is not None
    damage = dict(zip(profile.entries, profile.damage, strict=True))
    assert all(damage[name, "w16"] < 1e-3 * damage[name, "w2"] for name in profile.layers)
    report = result.export_onnx(tmp_path / "model.onnx")
    assert stored_bytes(report.path) <= result.plan.total_bytes


def test_a_limit_on_accuracy_tries_it_beside_codes() -> None:
    model = perceptron()
    wanted = outputs(model, ROWS)

    def nearness(found: nn.Module) -> float:
        return -float((outputs(found, ROWS) - wanted).abs().mean())

    loss = -nearness(quantkit.quantize(model, "w8a8", ROWS, **QUICK).model)
    asked = {"evaluate": nearness, "schemes": ["w4a8", "w8a8", "w16"], **QUICK}
    result = quantkit.quantize(model, f"accuracy_drop={0.8 * loss}", ROWS, **asked)
    schemes = {str(scheme) for scheme in result.plan.schemes.values()}
    assert "w16" in schemes and schemes & {"w4a8", "w8a8"}
    assert -nearness(result.model) <= 0.8 * loss


@pytest.mark.parametrize("budget", [{"activation_bytes": "700 B"}, {"bops": "30%"}])
def test_limits_on_what_runs_count_it_as_a_float_layer(budget: dict[str, str]) -> None:
    result = quantkit.quantize(perceptron(), budget, ROWS, schemes=["w8a8", "w16"], **QUICK)
    assert "w8a8" in {str(scheme) for scheme in result.plan.schemes.values()}
    on_codes = {name for name, scheme in result.plan.schemes.items() if scheme.has_codes}
    assert {reader for site in result.quantized.sites for reader in site.consumers} == on_codes


def test_a_mapping_applies_it_and_a_folder_gives_it_back(tmp_path: Path) -> None:
    model = perceptron()
    result = quantkit.apply(model, {"rows.2": "w16", "head": "w4a8"}, ROWS, workdir=tmp_path / "work", **QUICK)
    assert result.notes["rounding"]["rows.2"] == "nearest float16"
    again = quantkit.apply(model, {"rows.2": "w16", "head": "w4a8"}, ROWS, workdir=tmp_path / "work", **QUICK)
    loaded = quantkit.load(result.save(tmp_path / "saved"), perceptron())
    wanted = outputs(result.model, ROWS)
    assert torch.equal(outputs(again.model, ROWS), wanted)
    assert torch.equal(outputs(loaded.model, ROWS), wanted)
    assert loaded.quantized.weights["rows.2"].format == result.plan.schemes["rows.2"].weight
    torch.testing.assert_close(outputs(result.to_real().model, ROWS), wanted, rtol=1e-5, atol=1e-5)


def test_without_any_data_it_is_what_rounding_gives() -> None:
    model = perceptron()
    result = quantkit.quantize(model, "w16", progress=False)
    assert torch.equal(outputs(result.model, ROWS), outputs(twin(model), ROWS))


def test_a_model_in_float16_is_stored_as_it_is() -> None:
    model = perceptron().half()
    result = quantkit.quantize(model, "w16", ROWS, **QUICK)
    assert result.plan.size_bytes == sum(2 * p.numel() for p in model.parameters() if p.dim() > 1)
    assert torch.equal(outputs(result.model, ROWS), outputs(copy.deepcopy(model).float(), ROWS))


def test_codes_beside_it_are_learned_and_it_stays() -> None:
    model, x = perceptron(), randn(64, 2, 32)
    result = quantkit.quantize(model, "w3a8", x, rules={"head": "w16"}, progress=False, correction="bias")
    assert torch.equal(result.quantized.floats["head"], twin(model).head.weight)
    assert "reconstruction" in result.notes


ABOVE = r"its weight reaches 70000, and float16 ends at 65504"


@pytest.mark.parametrize(
    ("verb", "request_"),
    [
        (quantkit.quantize, {"budget": "w8a8", "rules": {"rows.2": "w16"}}),
        (quantkit.quantize, {"budget": "8 bits", "schemes": ["w16"]}),
        (quantkit.apply, {"plan": {"rows.2": "w16"}}),
    ],
    ids=["rule", "schemes", "plan"],
)
def test_a_weight_beyond_float16_is_refused_by_name(verb: Any, request_: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=rf"Layer 'rows.2' cannot be w16: {ABOVE}\. Leave it float, or give it"):
        verb(beyond(), calibration=ROWS, **request_, **QUICK)


def test_a_weight_beyond_float16_is_no_candidate_among_others(caplog: pytest.LogCaptureFixture) -> None:
    result = quantkit.quantize(beyond(), "9 bits", ROWS, schemes=["w8", "w16"], **QUICK)
    assert str(result.plan.schemes["rows.2"]) == "w8"
    assert any("w16 is no candidate for rows.2" in said for said in result.notes["notices"])


def test_a_weight_beyond_float16_stays_float_where_every_layer_that_can_gets_it() -> None:
    plan = quantkit.quantize(beyond(), "w16", ROWS, **QUICK).plan
    assert {n: str(s) for n, s in plan.schemes.items()} == {"rows.0": "w16", "rows.2": "float", "head": "w16"}
    assert "float16 ends at 65504" in plan.why["rows.2"]


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("w16a8", "w16a8 is not supported by target onnxruntime-cpu yet: float16 weights compute in float"),
        ("w16g32", "asks for groups, zero points or scales of float16 numbers, which have none. Ask for 'w16'"),
    ],
)
def test_what_it_cannot_be_combined_with_is_refused_before_anything_runs(scheme: str, message: str) -> None:
    class Untouched(Perceptron):
        def forward(self, x):
            raise AssertionError("the model ran")

    with pytest.raises(InvalidRequest, match=message):
        quantkit.quantize(Untouched(), "w8a8", ROWS, rules={"head": scheme}, **QUICK)
