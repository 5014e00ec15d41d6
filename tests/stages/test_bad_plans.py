"""Plans, profiles and weights edited by hand or damaged: refused with the reason before any work, nothing left."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import quantkit
from quantkit.errors import CorruptFile, InvalidRequest
from quantkit.plan import Plan, Profile
from quantkit.stages import apply as stage
from quantkit.stages.result import Result
from quantkit.targets import Target
from tests.stages.networks import images, small


@pytest.fixture(scope="module")
def result() -> Result:
    return quantkit.quantize(small(), "4 bits", images(), schemes=["w3a8", "w8a8"], progress=False)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test when anything is measured or rounded."""

    def fail(*arguments: Any, **options: Any) -> None:
        pytest.fail("the plan was carried out")

    for name in ("PlanApplication", "Subject"):
        monkeypatch.setattr(stage, name, fail)


def edited(plan: Plan, path: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    data = json.loads(plan.save(path).read_text())
    edit(data)
    path.write_text(json.dumps(data))
    return path


EDITS = {
    "unknown layer": (
        lambda d: d["schemes"].update(cnov="w3a8"),
        r"^The plan names layer 'cnov', which the model does not have\. Did you mean 'conv'",
    ),
    "a module without weight": (
        lambda d: d["schemes"].update({"stem.2": "w3a8"}),
        r"^'stem\.2' in the plan owns no weight to quantize",
    ),
    "scheme the target cannot run": (
        lambda d: d["schemes"].update(conv="w4a3"),
        r"^The plan gives layer 'conv' w4a3: activation format a3 is not supported by target onnxruntime-cpu yet",
    ),
    "scheme without activations": (
        lambda d: d["schemes"].update(conv="w4"),
        r"^w4 beside w3a8: weights alone in some layers and activations too in others is not supported yet",
    ),
    "nothing quantized": (
        lambda d: d.update(schemes=dict.fromkeys(d["schemes"], "float")),
        r"^The plan quantizes no layer: every scheme in it is 'float'",
    ),
    "unknown site": (
        lambda d: d["sites"].update(sterm="a8"),
        r"^The plan names site 'sterm', which the model does not have\. Did you mean",
    ),
    "site unlike its layer": (
        lambda d: d["sites"].update(input="a3"),
        r"^The plan asks for several formats of one tensor, 'input': stem\.0 a8, site input a3\. Give it one",
    ),
    "site the target cannot run": (
        lambda d: d["sites"].update(mix="a3"),  # an operand of the residual sum: no layer reads it
        r"^The plan gives site 'mix' a3: activation format a3 is not supported by target onnxruntime-cpu yet",
    ),
    "float site": (
        lambda d: d["sites"].update(input="float"),
        r"^The plan asks for several formats of one tensor, 'input': stem\.0 a8, site input float\. Give it one",
    ),
    "float where a kernel writes codes": (
        lambda d: d["sites"].update(mix="float"),
        r"^The plan leaves site 'mix' float, which is a layer output, and onnxruntime-cpu needs codes there",
    ),
    "wrong size": (
        lambda d: d.update(size_bytes=d["size_bytes"] + 1),
        r"^The plan promises 8\d\d bytes of weights, its schemes take 8\d\d\. If it was edited by hand, set its",
    ),
    "other widths, old size": (
        lambda d: d["schemes"].update(conv="w7a8"),
        r"^The plan promises .* its schemes take .*set its size_bytes to 0",
    ),
}


@pytest.mark.parametrize(("edit", "message"), EDITS.values(), ids=EDITS)
def test_an_edited_plan_that_does_not_fit(edit, message: str, result: Result, tmp_path: Path, no_work: None) -> None:
    plan = Plan.load(edited(result.plan, tmp_path / "plan.json", edit))
    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InvalidRequest, match=message):
        quantkit.apply(model, plan, images(), progress=False, inplace=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_edited_plan_that_fits_is_carried_out(result: Result, tmp_path: Path) -> None:
    def edit(data: dict[str, Any]) -> None:
        data["schemes"]["conv"] = "w7a8"
        data["size_bytes"] = 0

    plan = Plan.load(edited(result.plan, tmp_path / "plan.json", edit))
    made = quantkit.apply(small(), plan, images(), progress=False)
    assert str(made.plan.schemes["conv"]) == "w7a8"
    assert made.plan.size_bytes > result.plan.size_bytes


def test_layers_that_read_one_tensor_in_two_formats(no_work: None) -> None:
    class Fork(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)

        def forward(self, x):
            return self.left(x) + self.right(x)

    target = replace(Target.load("onnxruntime-cpu"), activation_bits=(4, 8))
    message = r"^The plan asks for several formats of one tensor, 'input': left a8, right a4\. Give it one"
    with pytest.raises(InvalidRequest, match=message):
        plan = {"left": "w4a8", "right": "w4a4"}
        quantkit.apply(Fork(), plan, torch.randn(6, 4), target=target, progress=False)


CALLS = {
    "a plan of text": ({"plan": "w4a8"}, r"^A plan is a Plan or a mapping layer name -> scheme, not 'w4a8'"),
    "unreadable scheme": ({"plan": {"conv": "w44"}}, r"^'conv': Unknown scheme 'w44'"),
    "empty plan": ({"plan": {}}, r"^The plan quantizes no layer"),
    "unknown rounding": ({"rounding": "up"}, r"^Unknown rounding 'up'; known: auto, gptq, gptaq"),
    "unknown ranges": (
        {"ranges": "max"},
        r"^Unknown ranges 'max'; known: minmax, mse, percentile, entropy\. Did you mean 'minmax'",
    ),
    "unknown loss": ({"loss": "hinge"}, r"^Unknown loss 'hinge'; known: auto, kl, mse"),
    "unknown target": ({"target": "gpu"}, r"^Unknown target 'gpu'; known: onnxruntime-cpu"),
    "evaluate": ({"evaluate": "top1"}, r"^evaluate must be a function \(model -> metric\), not str"),
    "no data": ({"calibration": []}, r"^The calibration data is empty"),
    "NaN": ({"calibration": images() * float("nan")}, r"^Calibration batch 0 contains NaN"),
    "rejected batch": ({"calibration": [images(), torch.zeros(2, 2)]}, r"^The model rejected a calibration batch"),
}


@pytest.mark.parametrize(("options", "message"), CALLS.values(), ids=CALLS)
def test_apply_refuses_a_bad_request(options: dict[str, Any], message: str, no_work: None) -> None:
    usual: dict[str, Any] = {"plan": {"conv": "w4a8"}, "calibration": images(), "progress": False}
    with pytest.raises(InvalidRequest, match=message):
        quantkit.apply(small(), **(usual | options))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut off": lambda data: data[: 2 * len(data) // 3],
    "another file": lambda data: b"\x89PNG\r\n" + bytes(100),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("file", ["plan.json", "weights.safetensors"])
def test_a_damaged_result_is_not_loaded(damage, file: str, result: Result, tmp_path: Path) -> None:
    path = result.save(tmp_path) / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CorruptFile, match=rf"{file}' is (damaged|not valid JSON)"):
        quantkit.load(tmp_path, small())


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_profile_is_not_loaded(damage, result: Result, tmp_path: Path) -> None:
    assert result.profile is not None
    path = result.profile.save(tmp_path / "profile.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CorruptFile, match=r"is not a complete quantkit profile .*Run `quantkit profile` again"):
        Profile.load(path)


def test_what_cannot_be_written_leaves_nothing(result: Result, tmp_path: Path) -> None:
    """Permissions do not stop root; a file in the place of a folder stops everybody."""
    (tmp_path / "file").write_text("not a folder")
    nowhere = tmp_path / "file" / "out"
    for write in (result.save, lambda folder: result.export_onnx(folder / "model.onnx")):
        with pytest.raises(InvalidRequest, match=r"Cannot write '.*Choose a folder that exists and can be written"):
            write(nowhere)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_folder_that_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"there is no folder '.*missing'"):
        quantkit.load(tmp_path / "missing")
    with pytest.raises(InvalidRequest, match=r"was not made by a recipe, .*pass model="):
        quantkit.load(tmp_path)
    with pytest.raises(InvalidRequest, match=r"Cannot read the plan '.*plan\.json': No such file"):
        quantkit.load(tmp_path, small())
