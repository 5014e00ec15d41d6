"""The whole path in one call: inside the budget, the user's model untouched, the same plan every time."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import quantkit
from quantkit.backends.onnxruntime.sessions import open_session
from quantkit.errors import InvalidRequest
from quantkit.formats import Scheme
from quantkit.plan import Plan
from quantkit.stages.result import Result
from tests.program.models import settled
from tests.stages.networks import Small, images, small

SITE_BYTES = 6  # a float32 scale, a zero point of one byte, and one for the highest code
CHANNELS = 12 + 12 + 12 + 10  # each with a zero point, and a scale for its INT32 bias
CONSTANTS = 16 + 4 * 4  # allowed for the axes of the mean, and a scalar for each element-wise call
LAYER_WEIGHTS = {"stem.0": 12 * 2 * 9, "conv": 12 * 12 * 9, "mix": 12 * 12, "head": 12 * 10}
WEIGHTS = sum(LAYER_WEIGHTS.values())
MACS = {name: count * (36 if name != "head" else 1) for name, count in LAYER_WEIGHTS.items()}  # 6 x 6 pixels


def quantized(budget="4 bits", **options) -> Result:
    return quantkit.quantize(small(), budget, images(), progress=False, **options)


@pytest.fixture(scope="module")
def result() -> Result:
    return quantized()


def stored_tensors(folder: Path) -> dict[str, np.ndarray]:
    with safe_open(str(folder / "weights.safetensors"), framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


BUDGETS = ["2.9 bits", "4 bits", "9 bits", "1200 B", "20%", "bops=4%", "5 bits, 1.3 KB", {"size": "1.4 KB"}]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_what_is_saved_is_inside_the_budget(budget, tmp_path: Path) -> None:
    """Counted from the bytes on disk, by nothing of quantkit."""
    made = quantized(budget)
    tensors = stored_tensors(made.save(tmp_path))
    layer_bytes = sum(t.nbytes for name, t in tensors.items() if ".weight." in name)
    other_bytes = sum(t.nbytes for name, t in tensors.items() if ".weight." not in name)
    bits = {name: scheme.weight.bits for name, scheme in made.plan.schemes.items() if scheme.weight}
    found = {
        "average_bits": 8 * layer_bytes / WEIGHTS,
        "size": layer_bytes + other_bytes + SITE_BYTES * len(made.plan.sites) + 5 * CHANNELS + CONSTANTS,
        "bops": sum(MACS[name] * bits[name] * 8 for name in MACS),
    }
    floats = sum(p.numel() for p in small().parameters()) * 4 + 2 * 12 * 4  # the norm's statistics
    amounts = {"bits": 1, "B": 1, "KB": 1000}
    for name, text in quantkit.Budget.parse(budget).asked.items():
        if text.endswith("%"):
            limit = float(text[:-1]) / 100 * (floats if name == "size" else 1024 * sum(MACS.values()))
        else:
            number, unit = text.split()
            limit = float(number) * amounts[unit]
        assert found[name] <= limit
    assert (made.plan.size_bytes, made.plan.average_bits) == (layer_bytes, pytest.approx(found["average_bits"]))
    assert made.plan.total_bytes == found["size"]


@pytest.mark.slow
def test_a_larger_budget_is_used_for_less_damage() -> None:
    damages = [quantized(budget).plan.predicted_damage for budget in ("3 bits", "4 bits", "6 bits")]
    assert damages == sorted(damages, reverse=True)
    assert damages[0] > 2 * damages[-1]


def test_the_prediction_is_near_what_is_measured(result: Result) -> None:
    assert 0.3 < result.metrics["calibration_damage"] / result.plan.predicted_damage < 3
    assert 0.5 < result.metrics["calibration_agreement"] <= 1


def test_every_layer_has_a_reason(result: Result) -> None:
    assert result.plan.schemes.keys() == result.plan.why.keys() == {"stem.0", "conv", "mix", "head"}
    assert all(str(scheme) in result.plan.why[name] for name, scheme in result.plan.schemes.items())


@pytest.mark.slow
def test_onnxruntime_and_the_saved_result_compute_the_same(result: Result, tmp_path: Path) -> None:
    x = images(50, seed=9)
    with torch.no_grad():
        expected = result.model(x)
    report = quantkit.export_onnx(result, tmp_path / "model.onnx")
    session = open_session(report.path, threads=1)
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    assert np.linalg.norm(found - expected.numpy()) < 0.02 * np.linalg.norm(expected.numpy())
    loaded = quantkit.load(result.save(tmp_path), small(seed=8).train())
    assert not loaded.model.training
    with torch.no_grad():
        assert torch.equal(loaded.model(x), expected)
    assert loaded.plan == result.plan
    with pytest.raises(InvalidRequest, match=r"carries no calibration data: pass example="):
        loaded.export_onnx(tmp_path / "again.onnx")
    again = loaded.export_onnx(tmp_path / "again.onnx", example=x[:4], check=[x[:8], x[8:12]])
    assert again.path.read_bytes() == report.path.read_bytes()


def test_the_same_call_gives_the_same_plan_to_the_byte(tmp_path: Path) -> None:
    texts = [quantized("3 bits", seed=5).plan.save(tmp_path / f"{i}.json").read_bytes() for i in range(2)]
    assert texts[0] == texts[1]


def test_a_one_shot_iterable_of_any_split_gives_the_same_decision(result: Result) -> None:
    """Labels are dropped, and batches joined to no other decision."""
    items = ((part, torch.zeros(len(part))) for part in images().split(12))
    made = quantkit.quantize(small(), "4 bits", items, progress=False)
    assert made.plan.schemes == result.plan.schemes


@pytest.mark.parametrize("training", [True, False])
def test_the_users_model_is_untouched(training: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = small().train(training)
    model.mix.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    with caplog.at_level(logging.INFO, logger="quantkit"):
        made = quantkit.quantize(model, "4 bits", images(), progress=False)
    assert ("the model is in training mode: quantizing a copy in eval mode" in caplog.text) is training
    assert not made.model.training
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.mix.parameters()] == [False, False]


def test_training_mode_changes_no_decision(result: Result) -> None:
    assert quantkit.quantize(small().train(), "4 bits", images(), progress=False).plan.schemes == result.plan.schemes


def test_in_place_changes_the_model_given() -> None:
    model = small()
    made = quantkit.quantize(model, "4 bits", images(), progress=False, inplace=True)
    assert made.quantized.model is model
    codes = made.quantized.weights["conv"]
    assert torch.equal(model.conv.weight, codes.dequantize())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_model_keeps_its_type_and_its_inputs(dtype: torch.dtype) -> None:
    model, x = small().to(dtype), images(8, seed=4).to(dtype)

    def evaluate(asked: torch.nn.Module) -> float:
        with torch.no_grad():
            return float(asked(x).abs().sum())

    made = quantkit.quantize(model, "4 bits", images(), evaluate=evaluate, progress=False)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert made.plan.average_bits <= 4
    assert made.metrics["float"] == pytest.approx(evaluate(model), rel=0.05)


def test_evaluate_is_reported_for_both_models() -> None:
    seen = []

    def evaluate(model: torch.nn.Module) -> float:
        with torch.no_grad():
            seen.append(float(model(images(8, seed=4)).abs().sum()))
        return seen[-1]

    made = quantized("3 bits", evaluate=evaluate)
    assert [made.metrics["float"], made.metrics["quantized"]] == seen
    with torch.no_grad():
        assert seen[0] == pytest.approx(float(small()(images(8, seed=4)).abs().sum()), rel=1e-4)
    assert seen[0] != seen[1]


@pytest.mark.parametrize("returned", [None, "good"], ids=["nothing", "text"])
def test_evaluate_that_returns_no_number(returned: object) -> None:
    with pytest.raises(InvalidRequest, match=r"evaluate returned .*number"):
        quantkit.apply(small(), {"conv": "w4a8"}, images(), evaluate=lambda model: returned, progress=False)


def test_rules_pin_layers_and_the_last_one_wins() -> None:
    rules = {"*": ["w4a8", "w3a8"], "head": "w8a8", "m*": "w2a8", "mix": "float"}
    schemes = quantized("9 bits", rules=rules).plan.schemes
    assert (str(schemes["head"]), str(schemes["mix"])) == ("w8a8", "float")
    assert {str(schemes["stem.0"]), str(schemes["conv"])} <= {"w3a8", "w4a8"}


def test_a_rule_may_leave_the_choice_of_float() -> None:
    free = quantized("30 bits", rules={"conv": ["float", "w2a8"]}).plan.schemes["conv"]
    tight = quantized("4 bits", rules={"conv": ["float", "w2a8"]}).plan.schemes["conv"]
    assert (str(free), str(tight)) == ("float", "w2a8")


def test_apply_takes_a_mapping_and_leaves_the_others_float(tmp_path: Path) -> None:
    made = quantkit.apply(small(), {"conv": "w3a8", "head": Scheme.parse("w8a8")}, images(), progress=False)
    assert {name: str(s) for name, s in made.plan.schemes.items()} == {
        "stem.0": "float", "conv": "w3a8", "mix": "float", "head": "w8a8",
    }  # fmt: skip
    kept = stored_tensors(made.save(tmp_path))
    assert made.plan.size_bytes == sum(t.nbytes for n, t in kept.items() if ".weight." in n) + 4 * (
        LAYER_WEIGHTS["stem.0"] + LAYER_WEIGHTS["mix"]
    )
    made.export_onnx(tmp_path / "model.onnx")


def test_apply_carries_out_a_plan_from_a_file(result: Result, tmp_path: Path) -> None:
    plan = Plan.load(result.plan.save(tmp_path / "plan.json"))
    made = quantkit.apply(small(), plan, images(), progress=False)
    x = images(6, seed=2)
    with torch.no_grad():
        assert torch.equal(made.model(x), result.model(x))


def test_profile_then_allocate_then_apply_is_quantize(result: Result) -> None:
    measured = quantkit.profile(small(), images(), progress=False)
    assert measured == result.profile
    assert quantkit.allocate(measured, "4 bits").schemes == result.plan.schemes


def test_nearest_rounding_and_extreme_ranges() -> None:
    made = quantized("4 bits", rounding="nearest", ranges="minmax", loss="mse", schemes=["w3a8", "w5a8"])
    assert {str(scheme) for scheme in made.plan.schemes.values()} <= {"w3a8", "w5a8"}
    assert set(made.profile.provenance["rounded"].values()) == {"nearest"}


def test_a_record_of_the_users_own_runs_and_is_exported(tmp_path: Path) -> None:
    @dataclass
    class Output:
        logits: torch.Tensor

    class Wrapped(Small):
        def forward(self, x):
            return Output(super().forward(x))

    made = quantkit.quantize(settled(Wrapped()), "4 bits", images(), progress=False)
    assert made.model(images(3)).logits.shape == (3, 10)
    report = made.export_onnx(tmp_path / "model.onnx")
    assert {one.output for one in report.parity} == {"logits"}


def test_samples_caps_the_calibration_data() -> None:
    made = quantized("4 bits", samples=5)
    assert sum(len(args[0]) for args, _ in made.calibration) == 5
    assert made.profile.provenance["samples"] == 5
