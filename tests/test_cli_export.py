"""The command line on ONNX files: what `run` and `export` write, and how the recipe and options shape it."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import pytest

from quantkit.backends.onnxruntime import model_files
from quantkit.cli import main
from tests.recipe.tiny import rewritten, write_tiny


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A folder with a recipe, whose profile the first run measures."""
    folder = tmp_path_factory.mktemp("cli")
    return rewritten(write_tiny(folder), workdir=str(folder / "work"))


@pytest.fixture
def recipe(shared: Path, tmp_path: Path, monkeypatch) -> str:
    """The recipe's path; the command runs in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return str(shared)


@pytest.mark.slow
def test_run_then_export(recipe: str, tmp_path: Path, capsys) -> None:
    assert main(["run", recipe, "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    first = (tmp_path / "out/tiny/model.onnx").read_bytes()
    (tmp_path / "out/tiny/model.onnx").unlink()
    assert main(["export", "out/tiny"]) == 0
    assert (tmp_path / "out/tiny/model.onnx").read_bytes() == first
    printed = capsys.readouterr().out
    assert re.search(r"^out/tiny/model\.onnx: [\d,]+ bytes, [\d,]+ of them the layers' weights$", printed, re.M)
    assert re.search(r"^output, integer kernels: \d\.\d\d% from the simulated model$", printed, re.M)
    assert main(["export", "out/tiny", "--out", "other.onnx", "--quiet"]) == 0
    assert (tmp_path / "other.onnx").read_bytes() == first


def sizes_in(path: str) -> list[str]:
    return [d.dim_param for d in onnx.load(path).graph.input[0].type.tensor_type.shape.dim]


@pytest.mark.slow
def test_sizes_that_vary(recipe: str, tmp_path: Path, capsys) -> None:
    """A recipe names them, for what is exported later too; the command line names others."""
    assert main(["run", recipe, "--set", "export.dynamic={x: {2: height}}", "--quiet"]) == 0
    assert sizes_in("out/tiny/model.onnx") == ["batch", "", "height", ""]
    first = (tmp_path / "out/tiny/model.onnx").read_bytes()
    assert main(["export", "out/tiny", "--quiet"]) == 0
    assert (tmp_path / "out/tiny/model.onnx").read_bytes() == first
    capsys.readouterr()
    assert main(["export", "out/tiny", "--dynamic", "x:3=width", "--out", "other.onnx", "--quiet"]) == 0
    assert "sizes that vary: x.shape[0] (batch), x.shape[3] (width)\n" in capsys.readouterr().out
    assert sizes_in("other.onnx") == ["batch", "", "", "width"]


@pytest.mark.slow
def test_tensors_in_a_second_file(recipe: str, tmp_path: Path, capsys, monkeypatch) -> None:
    """A recipe asks for it, for what is exported later too; so does the command line."""
    monkeypatch.setattr(model_files, "PAGE", 64)  # the network is small
    assert main(["run", recipe, "--set", "export.external_data=true", "--set", "output=apart", "--quiet"]) == 0
    assert "left in apart: model.onnx, model.onnx.data, plan.json" in capsys.readouterr().out
    first = {name: (tmp_path / "apart" / name).read_bytes() for name in ("model.onnx", "model.onnx.data")}
    assert main(["export", "apart", "--quiet"]) == 0
    assert {name: (tmp_path / "apart" / name).read_bytes() for name in first} == first
    assert f": {sum(map(len, first.values())):,} bytes, " in capsys.readouterr().out

    assert main(["run", recipe, "--set", "output=whole", "--quiet"]) == 0
    assert not (tmp_path / "whole" / "model.onnx.data").exists()
    assert main(["export", "whole", "--external-data", "--quiet"]) == 0
    assert (tmp_path / "whole" / "model.onnx.data").read_bytes() == first["model.onnx.data"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    {
        "no place": (["export", "out/none", "--dynamic", "x=width"], "--dynamic 'x=width' is not INPUT:AXIS=NAME"),
        "no input": (["run", "RECIPE", "--set", "export.dynamic={y: {2: height}}"], "export.dynamic: dynamic= names"),
        "no key": (["run", "RECIPE", "--set", "export.sizes={x: {2: height}}"], "export.sizes: unknown key"),
    }.values(),
    ids=["no place", "no input", "no key"],
)
def test_sizes_that_cannot_be_meant(recipe: str, arguments: list[str], message: str, capsys) -> None:
    assert main([recipe if text == "RECIPE" else text for text in arguments]) == 1
    assert message in capsys.readouterr().err
