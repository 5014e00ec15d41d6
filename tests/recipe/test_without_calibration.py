"""Recipes that name no calibration: what `quantkit.quantize(model, budget="4.5 bits")` does, as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import quantkit
from quantkit.cli import main
from quantkit.recipe.read import read_recipe
from quantkit.recipe.run import load, run_recipe
from tests.recipe.tiny import rewritten, write_tiny
from tests.stages.networks import images, small

EXAMPLE = {"npz": "data/images.npz", "inputs": "images", "select": [0, 2], "preprocess": "network.py:preprocess"}


def recipe_of(folder: Path, **changes: Any) -> Path:
    """The tiny recipe for weights alone, without data."""
    usual = {
        "calibration": None,
        "evaluate": None,
        "schemes": None,
        "budget": "4.5 bits",
        "output": str(folder / "out"),
    }
    return rewritten(write_tiny(folder), **usual | changes)


def test_it_gives_what_quantize_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe_of(tmp_path)
    assert main(["run", str(path), "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "plan.json, weights.safetensors, recipe.yaml; for model.onnx add example_inputs, one batch" in printed
    wanted = quantkit.quantize(small(), "4.5 bits", progress=False)
    found = load(tmp_path / "out")
    assert found.plan.schemes == wanted.plan.schemes and found.plan.average_bits <= 4.5
    assert all(torch.equal(w.codes, found.quantized.weights[n].codes) for n, w in wanted.quantized.weights.items())
    left = {file.name for file in (tmp_path / "out").iterdir()}
    assert left == {"plan.json", "weights.safetensors", "recipe.yaml", "work"}


def test_with_an_example_it_is_traced_and_exported(tmp_path: Path) -> None:
    path = recipe_of(tmp_path, example_inputs=EXAMPLE)
    result, measured = run_recipe(read_recipe(path), progress=False)
    assert result.folds == (("stem.0", "stem.1"),)
    assert set(result.notes["rounding"].values()) == {"hqq"}
    assert measured is not None and measured.quantized_bytes == (tmp_path / "out" / "model.onnx").stat().st_size
    again = load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again.model(images()), result.model(images()))
    assert again.export_onnx(tmp_path / "again.onnx").path.read_bytes() == (tmp_path / "out/model.onnx").read_bytes()


def test_an_endless_function_gives_one_example(tmp_path: Path) -> None:
    path = recipe_of(tmp_path, example_inputs={"python": "network.py:batches"}, first_last="8 bits")
    plan = run_recipe(read_recipe(path), progress=False)[0].plan
    assert str(plan.schemes["stem.0"]) == str(plan.schemes["head"]) == "w8"


def test_plan_and_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(recipe_of(tmp_path))
    assert main(["plan", path]) == 0
    printed = capsys.readouterr().out
    assert "w2, w3, w4, w5, w6, w8" in printed and "4.5 bits can be met" in printed
    assert "without calibration data nothing is measured" in printed
    assert main(["profile", path, "--quiet"]) == 0
    assert main(["allocate", str(tmp_path / "out/profile.safetensors"), "--budget", "4.5 bits", "--quiet",
                 "--out", str(tmp_path / "plan.json")]) == 0  # fmt: skip


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "activations": ({"schemes": ["w4a8"]}, "w4a8 quantizes activations, and without data nothing is known of their "),
    "learning": ({"reconstruction": "block"}, "reconstruction='block' needs data. Pass calibration=, a few hundred"),
    "both": ({"calibration": EXAMPLE, "example_inputs": EXAMPLE}, "example_inputs is for quantizing without data"),
    "nothing in the example": ({"example_inputs": {"select": "some"}}, "example_inputs: needs npz or python"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_needs_data_is_refused_with_what_to_pass(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_of(tmp_path, **changes)
    assert main(["run", str(path), "--quiet"]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "what"), [(["bench"], "bench"), (["allocate", "--front", "--measure"], "measuring plans")]
)
def test_what_runs_the_model_says_what_is_missing(
    command: list[str], what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(recipe_of(tmp_path))
    if command[0] == "allocate":
        assert main(["profile", path, "--quiet"]) == 0
        command = ["allocate", str(tmp_path / "out/profile.safetensors"), *command[1:]]
    assert main([*command, path, "--quiet"]) == 1
    assert f"{path}: {what} runs the model on data: add the key 'calibration'." in capsys.readouterr().err
