"""Transforms from the request to the files: which are made, by what, and that a plan makes them again."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import quantkit
from quantkit.errors import InvalidRequest
from quantkit.recipe.inventory import inventory
from tests.stages.test_reparameterize import Transformer

SCALINGS = "norm-shifting, norm-scaling, layer-scaling, key-scaling"
FIXED = {"rounding": "nearest", "reconstruction": "none", "correction": None, "reparameterization": "none"}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(5)
    return Transformer().eval()


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    return torch.randn(64, 7, 6, generator=torch.Generator().manual_seed(1))


def quantized(model: nn.Module, inputs: Tensor, transforms: str = "auto", **options: object) -> quantkit.Result:
    settings = {**FIXED, "progress": False, "transforms": transforms, **options}
    return quantkit.quantize(model, "w4a8", inputs, **settings)  # type: ignore[arg-type]


def codes(result: quantkit.Result) -> dict[str, Tensor]:
    return {name: weight.codes for name, weight in result.simulated().weights.items()}  # type: ignore[union-attr]


def same(one: quantkit.Result, other: quantkit.Result) -> bool:
    found, wanted = codes(one), codes(other)
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def damage(model: nn.Module, result: quantkit.Result) -> float:
    unseen = torch.randn(256, 7, 6, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return float((result.model(unseen) - model(unseen)).square().mean())


def test_transforms_lower_the_damage_of_uneven_channels_and_the_plan_says_which(
    model: nn.Module, inputs: Tensor
) -> None:
    plain, result, scaled = (quantized(model, inputs, transforms) for transforms in ("none", "auto", SCALINGS))
    assert max(damage(model, result), damage(model, scaled)) < damage(model, plain) / 2
    recorded = scaled.plan.provenance["transforms"]
    assert {"transform": "norm-shifting", "at": "norm1"} in recorded
    assert {"norm1 -> qkv", "norm2 -> fc1"} <= {r["at"] for r in recorded if r["transform"] == "norm-scaling"}
    assert "transforms" not in plain.plan.provenance
    assert result.plan.provenance["transforms"]
    assert any("damage of the narrowest formats on samples held back" in said for said in result.notes["notices"])


def test_a_plan_makes_its_transforms_again(model: nn.Module, inputs: Tensor, tmp_path: Path) -> None:
    result = quantized(model, inputs)
    result.plan.save(tmp_path / "plan.json")
    plan = quantkit.Plan.load(tmp_path / "plan.json")
    again = quantkit.apply(model, plan, inputs, progress=False, **FIXED)  # type: ignore[arg-type]
    assert same(again, result) and again.plan.provenance["transforms"] == plan.provenance["transforms"]
    without = quantkit.apply(model, plan, inputs, progress=False, transforms="none", **FIXED)  # type: ignore[arg-type]
    assert same(without, quantized(model, inputs, "none")) and "transforms" not in without.plan.provenance


def test_in_place_saved_and_exported_it_is_the_same_model(model: nn.Module, inputs: Tensor, tmp_path: Path) -> None:
    result = quantized(model, inputs)
    own = copy.deepcopy(model)
    in_place = quantized(own, inputs, inplace=True)
    assert same(in_place, result) and not torch.equal(own.norm1.weight, model.norm1.weight)
    result.save(tmp_path)
    torch.testing.assert_close(quantkit.load(tmp_path, model).model(inputs), result.model(inputs), rtol=0, atol=0)
    result.export_onnx(tmp_path / "model.onnx")  # compares with the simulation before it returns


def test_a_profile_is_measured_on_the_changed_model_and_its_plans_say_so(model: nn.Module, inputs: Tensor) -> None:
    measured = quantkit.profile(model, inputs, schemes=["w4a8", "w8a8"], progress=False)
    assert measured.provenance["transforms"]
    plan = quantkit.allocate(measured, budget="6 bits")
    assert plan.provenance["transforms"] == measured.provenance["transforms"]
    plain = quantkit.profile(model, inputs, schemes=["w4a8", "w8a8"], transforms="none", progress=False)
    assert "transforms" not in plain.provenance
    assert measured.predict(plan.schemes) < plain.predict(plan.schemes)


def test_transforms_that_are_named_are_made_whether_or_not_they_help(model: nn.Module, inputs: Tensor) -> None:
    result = quantized(model, inputs, "key-scaling, layer-scaling")
    assert {r["transform"] for r in result.plan.provenance["transforms"]} == {"layer-scaling", "key-scaling"}
    with pytest.raises(InvalidRequest, match="Unknown transforms 'smooth'; known: auto, none, "):
        quantized(model, inputs, "norm-scaling, smooth")


def test_weights_per_output_channel_alone_are_left_as_they_are(model: nn.Module, inputs: Tensor) -> None:
    result = quantkit.quantize(model, "w4", inputs, progress=False)
    assert "transforms" not in result.plan.provenance


def test_a_plan_with_transforms_needs_the_data_and_the_model(model: nn.Module, inputs: Tensor) -> None:
    plan = quantized(model, inputs, SCALINGS).plan
    weights = {name: str(scheme.weight) for name, scheme in plan.schemes.items()}
    alone = quantkit.Plan(schemes=quantkit.Plan.of(weights).schemes, provenance=plan.provenance)
    with pytest.raises(InvalidRequest, match="made with transforms, whose factors are found on data"):
        quantkit.apply(model, alone, progress=False)
    other = copy.deepcopy(model)
    other.norm1 = nn.Identity()
    with pytest.raises(InvalidRequest, match="norm1"):
        quantkit.apply(other, plan, inputs, progress=False, **FIXED)  # type: ignore[arg-type]


def test_what_changes_outputs_is_left_out_by_name(
    model: nn.Module, inputs: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from quantkit.transforms import channel_scaling

    right = channel_scaling.scale

    def wrong(weights: object, group: object, factors: Tensor) -> None:
        right(weights, group, factors)  # type: ignore[arg-type]
        if group.name == "norm2 -> fc1":  # type: ignore[attr-defined]
            weights.model.norm2.weight.data *= 1.01  # type: ignore[attr-defined]

    monkeypatch.setattr(channel_scaling, "scale", wrong)
    result = quantized(model, inputs, "norm-scaling")
    assert {r["at"] for r in result.plan.provenance["transforms"]} == {"norm1 -> qkv", "norm -> head"}
    assert "norm-scaling at norm2 -> fc1 changes outputs by" in caplog.text


def test_transforms_are_listed() -> None:
    assert "norm-shifting, norm-scaling, layer-scaling, key-scaling" in inventory()
