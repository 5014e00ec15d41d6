"""Activations quantized token by token: what a layer reads, as it comes, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantkit
from quantkit import QuantkitError, Result
from quantkit.backends.onnxruntime import token_forms as tokens_of_onnx
from quantkit.backends.onnxruntime import weights
from quantkit.backends.onnxruntime.onnx_model import OnnxModel
from quantkit.numbers.per_token import TokenRange
from quantkit.ranges.statistics import layer_hessians
from quantkit.reconstruction.learning import LearningOptions, Schedule
from quantkit.rounding.by_layers import moments
from quantkit.runtime.real import PackedLayer
from quantkit.simulation.playback import SimulatedProgram
from tests.numbers.test_token_codes import on_its_grid
from tests.program.models import randn
from tests.rounding.test_rounding_by_layers import parts_of, recorded
from tests.stages.networks import images, small
from tests.stages.schedules import shorten

WIDTH = 12
LAYERS = ("up", "mix", "down")
SHORT = LearningOptions(
    network=Schedule(steps=150, batch=32, code_rate=3e-4), block=Schedule(steps=30, batch=32, code_rate=3e-3)
)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(SHORT, monkeypatch)


class Mixer(nn.Module):
    """Two layers read what a norm made, which a residual adds too; one layer runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.mix = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        y = F.gelu(self.mix(F.relu(self.up(x)))) + x
        return self.down((self.mix(y) + x).mean(1))


def mixer() -> nn.Module:
    torch.manual_seed(0)
    model = Mixer()
    with torch.no_grad():
        model.norm.weight.mul_(torch.linspace(0.2, 3, WIDTH))
    return model.eval()


def tokens(count: int = 80, seed: int = 1) -> Tensor:
    return randn(count, 4, WIDTH, seed=seed) * torch.tensor([0.1, 1.0, 5.0, 0.0]).reshape(4, 1)


def by_numpy(result: Result, x: Tensor) -> np.ndarray:
    """The network written out: weights from their codes, inputs of layers row by row on their grids, in float64."""
    state = {name: tensor.double().numpy() for name, tensor in result.quantized.model.state_dict().items()}

    def layer(name: str, value: np.ndarray) -> np.ndarray:
        bits = result.quantized.ranges[f"{name}/input"].bits
        weight, rows = result.quantized.weights[name], value.astype(np.float32).reshape(-1, value.shape[-1])
        read = np.stack([on_its_grid(row, bits) for row in rows]).reshape(value.shape)
        values = (weight.codes.double() * weight.scale.double()).numpy()
        return read.astype(float) @ values.T + state[f"{name}.bias"]

    value = x.double().numpy()
    value = (value - value.mean(-1, keepdims=True)) / np.sqrt(value.var(-1, keepdims=True) + 1e-5)
    norm = value * state["norm.weight"] + state["norm.bias"]
    inner = torch.from_numpy(layer("mix", np.maximum(layer("up", norm), 0)))
    y = F.gelu(inner).numpy() + norm
    return layer("down", (layer("mix", y) + norm).mean(1))


def applied(scheme: str, **options: Any) -> Result:
    options = {"calibration": tokens(), "reconstruction": "none", "correction": None, "progress": False} | options
    return quantkit.apply(mixer(), dict.fromkeys(LAYERS, scheme), **options)


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("bits", [4, 5, 8])
def test_simulation_and_the_onnx_file_compute_what_numpy_does(bits: int, tmp_path: Path) -> None:
    result = applied(f"w4a{bits}d")
    assert set(result.plan.sites) == {"up/input", "mix/input", "mix/input.1", "down/input"}
    assert set(result.plan.sites.values()) == {f"a{bits}d"}
    unseen = tokens(7, seed=3)
    found, wanted = outputs(result.model, unseen).numpy(), by_numpy(result, unseen)
    span = np.abs(wanted).max()
    assert np.median(np.abs(found - wanted)) < 1e-6 * span  # a sum on a tie may tip a code
    assert np.abs(found - wanted).max() < span / 2**bits
    report = result.export_onnx(tmp_path / "model.onnx", check=[unseen])
    assert report.opset == 21 and report.weight_bytes == result.plan.size_bytes
    written = OnnxModel(tmp_path / "model.onnx")(unseen).numpy()
    assert np.median(np.abs(written - wanted)) < 1e-6 * span
    assert np.abs(written - wanted).max() < span / 2**bits


def test_it_matters_what_is_quantized() -> None:
    """Another layer's input, or a range for the whole tensor, would not pass for this."""
    unseen = tokens(7, seed=3)
    dynamic, static = (outputs(applied(scheme).model, unseen) for scheme in ("w8a4d", "w8a4"))
    exact = outputs(mixer(), unseen)
    assert float((dynamic - exact).abs().mean()) < 0.8 * float((static - exact).abs().mean())
    assert float((dynamic - exact).abs().mean()) > 1e-3


def test_saved_loaded_and_run_on_integers(tmp_path: Path) -> None:
    unseen = tokens(7, seed=3)
    result = applied("w4a8d")
    result.save(tmp_path)
    again = quantkit.load(tmp_path, mixer())
    assert again.quantized.ranges == result.quantized.ranges == dict.fromkeys(result.plan.sites, TokenRange(8))
    wanted = outputs(result.model, unseen)
    assert torch.equal(outputs(again.model, unseen), wanted)
    real = result.to_real().model
    assert not any(isinstance(layer, PackedLayer) for layer in result.to_real().quantized.layers.values())
    assert float((outputs(real, unseen) - wanted).abs().max()) < float(wanted.abs().max()) / 2**8
    narrow = applied("w4a5d")
    assert torch.equal(outputs(narrow.to_real().model, unseen), outputs(narrow.model, unseen))


def test_profiled_allocated_and_learned(tmp_path: Path) -> None:
    options: dict[str, Any] = {"schemes": ["w2a4d", "w3a4d", "w3a8d"], "progress": False}
    result = quantkit.quantize(mixer(), "5.5 bits", tokens(), **options)
    assert result.plan.average_bits <= 5.5
    assert result.profile is not None and set(result.profile.sites) == set(result.plan.sites)
    assert result.notes["reconstruction"]["network"].helped
    stored = result.export_onnx(tmp_path / "model.onnx").stored_bytes
    assert stored <= result.plan.total_bytes <= stored + 128


@pytest.mark.parametrize("sensitivity", ["gram", "kl", "noise", "fisher", "first-order", "hessian-trace", "pairwise"])
def test_every_kind_of_estimator_scores_them(sensitivity: str) -> None:
    options: dict[str, Any] = {"schemes": ["w3a4d", "w3a8d"], "sensitivity": sensitivity, "progress": False}
    profile = quantkit.profile(mixer(), tokens(16), **options)
    damage = dict(zip(profile.entries, profile.damage.tolist(), strict=True))
    for site in profile.sites:
        assert damage[site, "a4d"] > damage[site, "a8d"] > 0


@pytest.mark.parametrize("how", ["network", "adaquant", "adaquant-parallel"])
def test_learning_lowers_the_damage_on_unseen_inputs(how: str) -> None:
    unseen = tokens(60, seed=3)
    exact = outputs(mixer(), unseen)
    rounded = applied("w2a4d", rounding="nearest")
    learned = applied("w2a4d", rounding="nearest", reconstruction=how)
    errors = [float((outputs(r.model, unseen) - exact).square().mean()) for r in (rounded, learned)]
    assert errors[1] < 0.9 * errors[0]


def test_weights_are_rounded_for_the_inputs_on_their_grids() -> None:
    x = tokens(21)
    ready, program, segments = recorded(mixer(), x)
    result = applied("w8a4d")
    ready.model.load_state_dict(mixer().state_dict())
    simulated = type(result.quantized)(ready.model, result.quantized.sites, {}, result.quantized.ranges)
    name = "up"
    found = moments(SimulatedProgram(simulated, program), segments[0], name, parts_of(ready, program, x)).hessian
    rows = outputs(ready.model.norm, x).reshape(-1, WIDTH).numpy()
    read = np.stack([on_its_grid(row, 4) for row in rows]).astype(float)
    np.testing.assert_allclose(found[0].numpy(), read.T @ read, rtol=1e-5, atol=1e-4)
    other = layer_hessians(simulated, ready.program, [name], [((x,), {})])[name].hessian
    torch.testing.assert_close(found, other, rtol=1e-5, atol=1e-4)


def test_without_calibration_one_example_finds_what_layers_read() -> None:
    result = quantkit.quantize(mixer(), "7 bits", example_inputs=tokens(2), schemes=["w3a8d", "w4a8d"], progress=False)
    assert set(result.notes["rounding"].values()) == {"hqq"}
    assert set(result.plan.sites.values()) == {"a8d"} and not result.metrics
    unseen = tokens(7, seed=3)
    found, wanted = outputs(result.model, unseen).numpy(), by_numpy(result, unseen)
    assert np.median(np.abs(found - wanted)) < 1e-6 * np.abs(wanted).max()
    damage = sum(result.profile.damage[k] for k in result.profile.chosen(result.plan.schemes, result.plan.sites))
    assert damage == pytest.approx(result.plan.predicted_damage) and damage > 0


def test_the_first_and_the_last_layer_at_eight_bits() -> None:
    options: dict[str, Any] = {"first_last": "8 bits", "schemes": ["w3a4d"], "progress": False}
    plan = quantkit.quantize(mixer(), "12 bits", tokens(), **options).plan
    assert {name: str(s) for name, s in plan.schemes.items()} == {"up": "w8a8d", "mix": "w3a4d", "down": "w8a8d"}


def test_a_convolution_left_float_by_a_rule() -> None:
    rules = dict.fromkeys(("stem.0", "conv", "mix"), "float")
    result = quantkit.quantize(small(), "40 bits", images(), schemes=["w4a8d"], rules=rules, progress=False)
    assert list(result.quantized.weights) == ["head"] and set(result.plan.sites) == {"head/input"}


NO_DATA = {"calibration": None}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a convolution": (
        {"model": small(), "calibration": images(), "schemes": ["w4a8d"]},
        r"^'stem\.0' is a conv2d layer, and w4a8d quantizes inputs token by token, .* does for linear, matmul "
        r"layers\. Keep it float, by rules=\{'stem\.0': 'float'\}, or use static activations everywhere",
    ),
    "static beside": ({"schemes": ["w4a8d", "w4a6"]}, r"^w4a6 beside w4a8d: .* Use w4a8d, or static .* everywhere"),
    "weights beside": ({"schemes": ["w4a8d", "w4"]}, r"^w4 beside w4a8d: .* Use w4a8d, or leave activations out"),
    "no input at all": (
        {"schemes": ["w4a8d"]} | NO_DATA,
        r"^w4a8d quantizes what layers read, .* example_inputs=, one",
    ),
    "two formats without data": (
        {"schemes": ["w4a4d", "w4a8d"], "example_inputs": tokens(2)} | NO_DATA,
        r"^a4d and a8d: without data nothing tells .* or use one activation format in all schemes",
    ),
    "two formats by the error of weights": (
        {"schemes": ["w4a4d", "w4a8d"], "sensitivity": "weight-error"},
        "goes by the error of weights, which says nothing of activations",
    ),
    "groups": ({"schemes": ["w4a8dg4"]}, r"^activation format a8dg4 is not supported .* \(static or per token, bits"),
    "activation memory": (
        {"schemes": ["w4a8d"], "budget": "activation_bytes=1 KB"},
        "^activation_bytes=1 KB needs to",
    ),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_cannot_be_is_refused_with_what_to_use(options: dict[str, Any], message: str) -> None:
    usual: dict[str, Any] = {"model": mixer(), "budget": "9 bits", "calibration": tokens(), "progress": False}
    with pytest.raises(QuantkitError, match=message):
        quantkit.quantize(**usual | options)


def test_plans_are_refused_alike() -> None:
    with pytest.raises(QuantkitError, match=r"^'conv' is a conv2d layer, and w4a8d quantizes inputs token by token"):
        quantkit.apply(small(), {"conv": "w4a8d"}, images(), progress=False)
    with pytest.raises(QuantkitError, match=r"^w4a8 beside w4a8d"):
        quantkit.apply(mixer(), {"up": "w4a8d", "down": "w4a8"}, tokens(), progress=False)


@pytest.mark.parametrize("scheme", ["w3a8d", "w4a6d", "w8a8d"])
def test_the_file_multiplies_integers(scheme: str, tmp_path: Path) -> None:
    applied(scheme).export_onnx(tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert [node.op_type for node in graph.node].count("MatMulInteger") == 4
    assert not [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    assert sum(node.op_type == "ReduceMax" for node in graph.node) == 4


def test_full_bytes_of_weights_are_unsigned_where_kernels_saturate(tmp_path: Path) -> None:
    result, unseen = applied("w8a8d", target="onnxruntime-cpu:avx2"), tokens(7, seed=3)
    result.export_onnx(tmp_path / "model.onnx", check=[unseen])
    stored = {i.name: i for i in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert stored["up.weight"].data_type == 2  # UINT8
    written, wanted = OnnxModel(tmp_path / "model.onnx")(unseen).numpy(), by_numpy(result, unseen)
    assert np.median(np.abs(written - wanted)) < 1e-6 * np.abs(wanted).max()


def test_other_products_are_computed_in_float(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where an exporter spells a layer with another operator."""
    monkeypatch.setattr(weights, "reads_rows", lambda call, transposed: False)
    result, unseen = applied("w4a6d"), tokens(7, seed=3)
    result.export_onnx(tmp_path / "model.onnx", check=[unseen])
    assert not [n for n in onnx.load(tmp_path / "model.onnx").graph.node if n.op_type == "MatMulInteger"]
    written, wanted = OnnxModel(tmp_path / "model.onnx")(unseen).numpy(), by_numpy(result, unseen)
    assert np.median(np.abs(written - wanted)) < 1e-6 * np.abs(wanted).max()


def test_only_products_of_rows_are_multiplied_as_integers() -> None:
    read = [ir.Value(name=name) for name in "xwb"]
    calls = {
        "MatMul": ({}, {True}),
        "Gemm": ({}, {True}),
        "turned": ({"transB": 1}, {False}),
        "scaled": ({"transB": 1, "alpha": 2.0}, set()),
        "columns": ({"transA": 1}, set()),
    }
    for name, (attributes, wanted) in calls.items():
        call = ir.node(name if name == "MatMul" else "Gemm", read, attributes)
        assert {turned for turned in (True, False) if tokens_of_onnx.reads_rows(call, turned)} == wanted, name
