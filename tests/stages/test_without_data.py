"""Weights alone: without a single input, with one example to trace, and with data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantkit
from quantkit import QuantkitError
from quantkit.errors import InfeasibleBudget
from tests.stages.networks import images, small
from tests.stages.test_reconstruct import damage, digits, layers

LAYERS = ("stem.0", "conv", "mix", "head")


def quantized(**options: Any) -> quantkit.Result:
    return quantkit.quantize(small(), "4.5 bits", progress=False, **options)


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def test_nothing_but_the_model_is_needed() -> None:
    result = quantized()
    assert result.plan.average_bits <= 4.5
    assert all(scheme.weight is not None and scheme.activation is None for scheme in result.plan.schemes.values())
    assert set(result.notes["rounding"].values()) == {"hqq"}
    assert not result.quantized.ranges and not result.metrics and not result.folds
    assert result.profile.provenance["sensitivity"] == "weight-error"


def test_an_example_is_traced_and_changes_no_code() -> None:
    alone, traced = quantized(), quantized(example_inputs=images(2))
    assert traced.folds == (("stem.0", "stem.1"),)
    assert traced.plan.schemes == alone.plan.schemes
    assert all(torch.equal(w.codes, traced.quantized.weights[n].codes) for n, w in alone.quantized.weights.items())
    assert torch.allclose(outputs(alone.model, images()), outputs(traced.model, images()), atol=1e-5)
    assert [layer.macs > 0 for layer in traced.profile.layers.values()] == [True] * 4


def test_figures_say_what_they_are() -> None:
    """The predicted damage of a plan is the sum over layers of the mean relative error of their channels."""
    result, float_model, found = quantized(), small(), 0.0
    for name, weight in result.quantized.weights.items():
        rows = float_model.get_submodule(name).weight.detach().flatten(1)
        error = (weight.dequantize().flatten(1) - rows).square().sum(1) / rows.square().sum(1)
        found += float(error.mean())
    assert result.plan.predicted_damage == pytest.approx(found, rel=1e-5)


def test_the_plan_beats_uniform_widths_of_more_bytes_on_unseen_digits() -> None:
    model = digits()[0]
    mixed = quantkit.quantize(model, "3.9 bits", progress=False)
    uniform = quantkit.apply(model, dict.fromkeys(layers(), "w4"), rounding="nearest", progress=False)
    assert mixed.plan.size_bytes < uniform.plan.size_bytes
    assert damage(mixed) < damage(uniform)


def test_it_is_saved_exported_and_run_from_packed_weights(tmp_path: Path) -> None:
    for example in (None, images(2)):
        result = quantized(example_inputs=example)
        result.save(tmp_path / "saved")
        again = quantkit.load(tmp_path / "saved", small())
        assert torch.equal(outputs(again.model, images()), outputs(result.model, images()))
        report = result.export_onnx(tmp_path / "model.onnx", example=images(2), check=[images()])
        assert report.weight_bytes == result.plan.size_bytes
        assert torch.allclose(outputs(result.to_real().model, images()), outputs(result.model, images()), atol=1e-6)


def test_with_data_weights_alone_are_rounded_and_learned_on_it() -> None:
    model, seen, _ = digits()
    plan = dict.fromkeys(layers(), "w2")
    alone = quantkit.apply(model, plan, progress=False)
    rounded = quantkit.apply(model, plan, seen, reconstruction="none", correction=None, progress=False)
    assert not rounded.quantized.ranges
    assert damage(rounded) < 0.5 * damage(alone)
    found = quantkit.quantize(small(), "4.5 bits", images(), schemes=["w3", "w4", "w6"], progress=False)
    assert found.profile.provenance["sensitivity"] == "gram" and not found.profile.sites
    assert "calibration_damage" in found.metrics


def test_in_place() -> None:
    model = small()
    result = quantized()
    own = quantkit.apply(model, result.plan, inplace=True, progress=False)
    assert own.quantized.model is model
    assert torch.equal(model.conv.weight, result.quantized.weights["conv"].dequantize())


class Tied(nn.Module):
    """A layer whose weight another module computes with."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6, bias=False), nn.Linear(6, 4)
        self.other = nn.Module()
        self.other.table = self.first.weight

    def forward(self, x):
        return self.last(torch.relu(self.first(x)) @ self.other.table)


def test_a_weight_that_others_hold_stays_float() -> None:
    result = quantkit.quantize(Tied(), "24 bits", progress=False)
    assert str(result.plan.schemes["first"]) == "float"
    assert "also other.table, and without example_inputs nobody knows who reads it" in (
        result.profile.layers["first"].reason
    )


PASS = r"Pass calibration=, a few hundred typical inputs; labels are not needed"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "activations": ({"schemes": ["w4", "w4a8"]}, rf"^w4a8 quantizes activations, .*{PASS}.*schemes=\['w4'\]"),
    "activations by a rule": ({"rules": {"head": "w8a8"}}, rf"^w8a8 quantizes activations, .*{PASS}"),
    "gptq": ({"rounding": "gptq"}, rf"^rounding='gptq' needs data\. {PASS}; or rounding='nearest' or rounding='hqq'"),
    "gram": ({"sensitivity": "gram"}, rf"^sensitivity='gram' needs data\. {PASS}; or sensitivity='weight-error'"),
    "learning": (
        {"reconstruction": "block"},
        rf"^reconstruction='block' needs data\. {PASS}; or reconstruction='none'",
    ),
    "correcting": ({"correction": "bias"}, rf"^correction='bias' needs data\. {PASS}; or correction='none'"),
    "effort": ({"effort": "balanced"}, rf"^effort='balanced' needs data\. {PASS}; or effort='fast'"),
    "bops": ({"budget": "bops=10%"}, r"^bops=10% needs the multiply-accumulates .* pass example_inputs="),
    "an example that does not fit": ({"example_inputs": torch.zeros(2, 5, 6, 6)}, "^The model rejected"),
    "both": ({"calibration": images(), "example_inputs": images()}, "^example_inputs is for quantizing without data"),
    "no module": ({"model": small}, r"^The model must be a torch\.nn\.Module, not function"),
    "some weights alone": (
        {"calibration": images(), "schemes": ["w4", "w4a8"]},
        r"^w4 beside w4a8: weights alone in some layers .* Use w4a8, or leave activations out everywhere",
    ),
    "weights with data": (
        {"calibration": images(), "schemes": ["w4a8", "w8a8"], "sensitivity": "weight-error", "budget": "9 bits"},
        "^sensitivity='weight-error' goes by the error of weights, which says nothing of activations",
    ),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_needs_data_is_refused_with_what_to_pass(options: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantkitError, match=message):
        quantkit.quantize(**{"model": small(), "budget": "4.5 bits", "progress": False} | options)


def test_apply_and_profile_refuse_alike() -> None:
    with pytest.raises(QuantkitError, match=rf"^w4a8 quantizes activations, .*{PASS}"):
        quantkit.apply(small(), {"head": "w4a8"})
    with pytest.raises(QuantkitError, match=r"^rounding='adaround' needs data"):
        quantkit.profile(small(), rounding="adaround")
    with pytest.raises(InfeasibleBudget, match="the smallest that can be reached is"):
        quantkit.quantize(small(), "1.5 bits")


def test_a_profile_without_data_is_kept_and_reused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"example_inputs": images(2), "workdir": tmp_path, "progress": False}
    first = quantkit.profile(small(), **options)
    with caplog.at_level("INFO", logger="quantkit"):
        assert quantkit.profile(small(), **options) == first
    assert any("reusing the profile" in record.getMessage() for record in caplog.records)
    assert quantkit.profile(small(), workdir=tmp_path, progress=False) != first
    budget = "20%, bops=12%"
    plan = quantkit.allocate(first, budget)
    assert quantkit.apply(small(), plan, example_inputs=images(2), progress=False).plan.schemes == plan.schemes


def test_a_limit_on_accuracy_is_met_by_evaluating() -> None:
    model, _, unseen = digits()
    with torch.no_grad():
        wanted = model(unseen).argmax(-1)

    def agreement(other: nn.Module) -> float:
        return 100 * float((outputs(other, unseen).argmax(-1) == wanted).float().mean())

    result = quantkit.quantize(model, "accuracy_drop=3", evaluate=agreement, progress=False)
    assert result.metrics["quantized"] >= 97
    assert result.plan.average_bits < 6
