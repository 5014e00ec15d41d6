"""Carrying out a recipe: what it leaves, what it measures, what it takes up again, and what it refuses first."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml

import quantkit
from quantkit.backends.onnxruntime import writer as onnx_writer
from quantkit.backends.onnxruntime.onnx_model import OnnxModel
from quantkit.errors import InfeasibleBudget, InvalidRequest, ParityError, QuantkitError
from quantkit.plan import Plan, Profile
from quantkit.recipe.forecast import forecast_of
from quantkit.recipe.read import Recipe, read_recipe
from quantkit.recipe.run import inputs_of, profile_recipe, record, run_recipe
from quantkit.report.summary import Measured
from quantkit.stages import profile as stage
from quantkit.stages.result import Result
from tests.recipe.tiny import rewritten, write_tiny
from tests.stages.networks import images, small

LEFT = {"model.onnx", "plan.json", "weights.safetensors", "recipe.yaml", "work"}


def in_folder(path: Path, folder: Path, **changes: Any) -> Recipe:
    return read_recipe(rewritten(path, output=str(folder), **changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("recipe")


@pytest.fixture(scope="module")
def ran(folder: Path) -> tuple[Result, Measured]:
    return run_recipe(in_folder(write_tiny(folder), folder / "out"), progress=False)


def test_what_a_run_leaves(ran: tuple[Result, Measured], folder: Path) -> None:
    result, measured = ran
    out = folder / "out"
    assert {path.name for path in out.iterdir()} == LEFT
    assert Plan.load(out / "plan.json") == result.plan
    assert result.plan.average_bits <= 4
    assert measured.quantized_bytes == (out / "model.onnx").stat().st_size
    properties = {p.key: p.value for p in onnx.load(out / "model.onnx").metadata_props}
    assert properties["quantkit.plan"] == result.plan.digest()
    assert list((out / "work").glob("profile-*.safetensors"))


def test_what_a_run_measures(ran: tuple[Result, Measured], folder: Path) -> None:
    result, measured = ran
    x, labels = images(64)[24:], np.load(folder / "data" / "images.npz")["labels"][24:]
    with torch.no_grad():
        simulated = result.model(x).argmax(-1).numpy()
        exported = OnnxModel(folder / "out" / "model.onnx")(x).argmax(-1).numpy()
    assert measured.metrics["float"] == 100  # the labels are what the float network says
    assert measured.metrics["quantized"] == pytest.approx(100 * np.mean(simulated == labels))
    assert measured.metrics["onnx"] == pytest.approx(100 * np.mean(exported == labels))
    assert measured.metrics["agreement"] == pytest.approx(100 * np.mean(simulated == exported))
    assert measured.latency_batch == 32
    assert measured.latency_ratio > 0
    assert measured.float_bytes > 4 * 1776


def test_the_recipe_beside_its_results_builds_the_model_again(
    ran: tuple[Result, Measured], folder: Path, tmp_path: Path, monkeypatch
) -> None:
    """From any directory, with the paths of the recipe as it was."""
    kept = yaml.safe_load((folder / "out" / "recipe.yaml").read_text())
    assert kept["model"]["python"] == f"{folder}/network.py:build"
    assert kept["calibration"]["npz"] == f"{folder}/data/images.npz"
    monkeypatch.chdir(tmp_path)
    loaded = quantkit.load(folder / "out")
    x = images(9, seed=3)
    with torch.no_grad():
        assert torch.equal(loaded.model(x), ran[0].model(x))
    report = loaded.export_onnx(tmp_path / "again.onnx")
    assert report.path.read_bytes() == (folder / "out" / "model.onnx").read_bytes()


def test_a_second_run_takes_the_profile_up_again(
    ran: tuple[Result, Measured], folder: Path, tmp_path: Path, monkeypatch
) -> None:
    def fail(*arguments: Any) -> None:
        pytest.fail("measured again")

    monkeypatch.setattr(stage, "_measure", fail)
    path = write_tiny(tmp_path)
    recipe = in_folder(path, tmp_path / "out", workdir=str(folder / "out" / "work"), evaluate=None, budget="5 bits")
    result, measured = run_recipe(recipe, progress=False)
    assert result.profile == ran[0].profile
    assert not {"float", "quantized", "onnx", "agreement"} & measured.metrics.keys()
    assert {p.name for p in (tmp_path / "out").iterdir()} == LEFT - {"work"}


@pytest.mark.slow
def test_data_and_metric_of_functions(tmp_path: Path, monkeypatch) -> None:
    """Endless data with labels, a variable in the path of the network, and a metric that runs any model."""
    monkeypatch.delenv("QUANTKIT_DATA", raising=False)
    changes = {
        "calibration": {"python": "network.py:batches"},
        "evaluate": {"python": "network.py:brightness"},
        "model__python": "${QUANTKIT_DATA:-.}/network.py:build",
        "samples": 20,
    }
    path = write_tiny(tmp_path)
    result, measured = run_recipe(in_folder(path, tmp_path / "out", **changes), progress=False)
    assert sum(len(args[0]) for args, _ in result.calibration) == 20
    assert measured.metrics["onnx"] == pytest.approx(measured.metrics["quantized"], abs=0.05)
    loaded = quantkit.load(tmp_path / "out")
    assert [len(args[0]) for args, _ in loaded.calibration] == [8, 8, 4]
    loaded.export_onnx(tmp_path / "again.onnx")


@pytest.mark.slow
def test_a_file_that_fails_the_comparison_leaves_none_of_an_earlier_run(tmp_path: Path, monkeypatch) -> None:
    recipe = in_folder(write_tiny(tmp_path), tmp_path / "out")
    (tmp_path / "out").mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / "out" / name).write_bytes(b"of an earlier plan")

    def differs(*arguments: Any) -> None:
        raise ParityError("The exported file does not compute what the simulated model computes.")

    monkeypatch.setattr(onnx_writer, "require_parity", differs)
    with pytest.raises(ParityError):
        run_recipe(recipe, progress=False)
    assert {path.name for path in (tmp_path / "out").iterdir()} == LEFT - {"model.onnx"}


def test_a_module_beside_the_recipe_is_found_from_the_results(tmp_path: Path) -> None:
    path = write_tiny(tmp_path)
    (tmp_path / "net_of_a_recipe.py").write_text((tmp_path / "network.py").read_text())
    recipe = in_folder(path, tmp_path / "out", model__python="net_of_a_recipe:build")
    kept = yaml.safe_load(record(recipe, tmp_path / "out").read_text())
    assert kept["model"]["python"] == f"{tmp_path}/net_of_a_recipe.py:build"
    assert kept["calibration"]["preprocess"] == f"{tmp_path}/network.py:preprocess"
    recipe = in_folder(path, tmp_path / "out", model__python="some.package:build")
    assert yaml.safe_load(record(recipe, tmp_path / "out").read_text())["model"]["python"] == "some.package:build"


REFUSED: dict[str, tuple[dict[str, Any], str, type[QuantkitError]]] = {
    "budget": ({"budget": "4"}, r"tiny\.yaml:\d+: budget: Cannot read the budget '4'", InvalidRequest),
    "budget out of reach": ({"budget": "1 bits"}, r"^No plan has average bits 1 bits: the smallest", InfeasibleBudget),
    "target": ({"target": "cpu"}, r"tiny\.yaml:\d+: target: Unknown target 'cpu'; known: onnx", InvalidRequest),
    "scheme": ({"schemes": ["w4a8", "w1a8"]}, r"tiny\.yaml:\d+: schemes: Unknown scheme 'w1a8'", InvalidRequest),
    "scheme not run": ({"schemes": ["w4a3"]}, r"tiny\.yaml:\d+: schemes: .*a3 is not supported by ta", InvalidRequest),
    "estimator": ({"sensitivity": "gramm"}, r"tiny\.yaml:\d+: sensitivity: Unknown sensitivity 'gr", InvalidRequest),
    "solver": ({"solver": "gredy"}, r"tiny\.yaml:\d+: solver: Unknown solver 'gredy'.*'greedy'", InvalidRequest),
    "rounding": ({"rounding": "up"}, r"tiny\.yaml:\d+: rounding: Unknown rounding 'up'; known", InvalidRequest),
    "ranges": ({"ranges": "minmx"}, r"tiny\.yaml:\d+: ranges: Unknown ranges 'minmx'.*'minmax'", InvalidRequest),
    "loss": ({"loss": "hinge"}, r"tiny\.yaml:\d+: loss: Unknown loss 'hinge'; known: auto, kl", InvalidRequest),
    "rule": ({"rules": {"heat": "float"}}, r"The rule 'heat' matches no layer\. Did you mean 'head", InvalidRequest),
    "samples": ({"samples": 0}, r"samples=0: at least one calibration sample", InvalidRequest),
    "model": ({"model__python": "network.py:biuld"}, r"tiny\.yaml:2: model\.python: .*'build'", InvalidRequest),
    "data": ({"calibration__select": "nobody"}, r"tiny\.yaml:7: calibration\.select: selects no", InvalidRequest),
    "evaluation": ({"evaluate__labels": "few labels"}, r"tiny\.yaml:\d+: evaluate\.select: asks for", InvalidRequest),
    "output": ({"output": "network.py/out"}, r"^Cannot write '.*network\.py/out.*Choose a folder", InvalidRequest),
}


@pytest.mark.parametrize(("changes", "message", "error"), REFUSED.values(), ids=REFUSED)
def test_a_recipe_that_cannot_be_carried_out(
    changes: dict, message: str, error: type[QuantkitError], tmp_path: Path, monkeypatch
) -> None:
    def fail(*arguments: Any) -> None:
        pytest.fail("something was measured")

    monkeypatch.setattr(stage, "_measure", fail)
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe(rewritten(write_tiny(tmp_path), **({"output": "out"} | changes)))
    with pytest.raises(error, match=message):
        run_recipe(recipe, progress=False)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_only_the_profile(ran: tuple[Result, Measured], folder: Path, tmp_path: Path) -> None:
    recipe = in_folder(write_tiny(tmp_path), tmp_path / "out", workdir=str(folder / "out" / "work"))
    measured, path = profile_recipe(recipe, None, progress=False)
    assert measured == ran[0].profile == Profile.load(path)
    assert path == tmp_path / "out" / "profile.safetensors"
    assert profile_recipe(recipe, tmp_path / "mine.safetensors", progress=False)[1] == tmp_path / "mine.safetensors"


def test_the_forecast_changes_nothing_and_says_what_a_run_would_do(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe(rewritten(write_tiny(tmp_path), output="out", rules={"mix": "float"}, budget="12 bits"))
    text = forecast_of(recipe)
    assert "conv    conv2d   12x12x3x3      w3a8, w5a8, w8a8" in text
    assert "mix     conv2d   12x12x1x1      float: kept float by a rule" in text
    assert "12 bits can be met" in text
    assert "forwards of 24 samples" in text
    assert "rounding and learning: memory at most about" in text.splitlines()[-1]
    floats = 4 * sum(t.numel() for n, t in small().state_dict().items() if "tracked" not in n)
    assert f"{floats:,} in float" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("budget", "line"),
    [
        ("accuracy_drop=1%", "what the budget asks of accuracy has to be measured"),
        ("4 bits, accuracy_drop=1%", "4 bits can be met"),
    ],
)
def test_the_forecast_of_a_limit_on_accuracy(budget: str, line: str, tmp_path: Path) -> None:
    assert line in forecast_of(in_folder(write_tiny(tmp_path), tmp_path / "out", budget=budget)).splitlines()


def test_a_scheme_as_budget_profiles_nothing(tmp_path: Path) -> None:
    recipe = in_folder(write_tiny(tmp_path), tmp_path / "out", budget="w5a8", rules={"mix": "float"})
    lines = forecast_of(recipe).splitlines()
    assert "conv    conv2d   12x12x3x3      w5a8" in lines
    assert lines[-3:-1] == ["w5a8 can be met", "every layer has one candidate: nothing is profiled"]
    result, measured = run_recipe(recipe, progress=False)
    assert (result.profile, measured.weight_bytes) == (None, result.plan.size_bytes)
    assert {n: str(s) for n, s in result.plan.schemes.items()}["mix"] == "float"
    assert not list((tmp_path / "out").glob("work/profile-*"))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"budget": "2 bits"}, InfeasibleBudget),
        ({"solver": "gredy"}, InvalidRequest),
        ({"budget": "x"}, InvalidRequest),
        ({"budget": "w4a8"}, InvalidRequest),  # not among the recipe's schemes
        ({"budget": "w5a8, 900 B"}, InfeasibleBudget),
    ],
)
def test_the_forecast_refuses_what_a_run_would(changes: dict, error: type[QuantkitError], tmp_path: Path) -> None:
    with pytest.raises(error):
        forecast_of(in_folder(write_tiny(tmp_path), tmp_path / "out", **changes))


def test_plans_are_readable(ran: tuple[Result, Measured], folder: Path) -> None:
    plan = json.loads((folder / "out" / "plan.json").read_text())
    assert plan["schemes"].keys() == {"stem.0", "conv", "mix", "head"}
    assert plan["provenance"]["budget"] == "4 bits"


@pytest.mark.parametrize(
    ("select", "shared"),
    [([24, 64], None), ([20, 64], "4 of 44"), ("calibration", "24 of 24")],
    ids=["apart", "some", "the same"],
)
def test_evaluating_on_calibration_samples_is_said(select: Any, shared: str | None, tmp_path: Path, caplog) -> None:
    path = rewritten(write_tiny(tmp_path), evaluate__select=select, evaluate__preprocess="network.py:preprocess")
    with caplog.at_level(logging.WARNING, "quantkit"):
        inputs_of(read_recipe(path))
    assert caplog.text == "" if shared is None else f"{shared} samples to evaluate on are calibration" in caplog.text


def test_what_stays_float_is_float16_where_the_recipe_says_so(tmp_path: Path) -> None:
    """The head by its scheme, and the rest that has no codes."""
    path = rewritten(write_tiny(tmp_path), output=str(tmp_path / "out"), budget="w8a8", rules={"head": "w16"})
    changes = ["float_storage=float16", "rules.conv=float", "reconstruction=none", "correction=none"]
    result, measured = run_recipe(read_recipe(path, changes), progress=False)
    assert str(result.plan.schemes["head"]) == "w16" and result.plan.provenance["float_storage"] == "float16"
    kinds = {t.name: t.data_type for t in onnx.load(tmp_path / "out" / "model.onnx").graph.initializer}
    assert kinds["head.weight"] == kinds["conv.weight"] == onnx.TensorProto.FLOAT16
    assert measured.weight_bytes == result.plan.size_bytes
    with pytest.raises(InvalidRequest, match="Unknown float_storage 'half'; known: float32, float16"):
        run_recipe(read_recipe(path, ["float_storage=half"]), progress=False)
