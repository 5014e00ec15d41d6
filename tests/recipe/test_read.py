"""Reading a recipe: every error names file, line and key, and says what was meant."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from quantkit.errors import InvalidRequest
from quantkit.recipe.read import Recipe, read_recipe

MODEL = "model:\n  python: net.py:build\n"
DATA = "calibration:\n  npz: x.npz\n  inputs: images\n"
BUDGET = "budget: 4 bits\n"
WHOLE = MODEL + DATA + BUDGET  # lines 1-2, 3-5, 6


def read(folder: Path, text: str, *changes: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return read_recipe(path, changes)


def test_a_recipe_as_written(tmp_path: Path) -> None:
    recipe = read(tmp_path, WHOLE + "seed: 3\nschemes: [w4a8]\noutput: there\n")
    assert recipe.get("model", "python") == "net.py:build"
    assert recipe.get("model", "weights") is None
    assert recipe.get("budget", "size", default="none") == "none"
    assert recipe.settings() == {"budget": "4 bits", "seed": 3, "schemes": ["w4a8"]}
    assert (recipe.output, recipe.workdir) == (Path("there"), Path("there/work"))


def test_results_go_to_a_folder_named_after_the_recipe(tmp_path: Path) -> None:
    recipe = read(tmp_path, WHOLE)
    assert (recipe.output, recipe.workdir) == (Path("out/recipe"), Path("out/recipe/work"))


def test_a_target_file_lies_beside_the_recipe_or_where_the_command_runs(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path.parent)
    assert read(tmp_path, WHOLE).target is None
    assert read(tmp_path, WHOLE + "target: onnxruntime-cpu\n").settings()["target"] == "onnxruntime-cpu"
    written = read(tmp_path, WHOLE + "target: times/target.yaml\n")
    assert written.settings()["target"] == str(tmp_path / "times" / "target.yaml")
    named = read(tmp_path, WHOLE, "target=times/target.yaml")
    assert named.settings()["target"] == str(tmp_path.parent / "times" / "target.yaml")


ERRORS = {
    "unknown key": (WHOLE + "buget: 3 bits\n", r":7: buget: unknown key\. Did you mean 'budget'"),
    "unknown key in a section": (
        MODEL + "  weigths: w.safetensors\n" + DATA + BUDGET,
        r":3: model\.weigths: unknown key\. Did you mean 'weights'\? Known: python, weights\.$",
    ),
    "evaluate's key in calibration": (
        MODEL + DATA + "  labels: labels\n" + BUDGET,
        r":6: calibration\.labels: unknown key\.",
    ),
    "wrong type": (MODEL + DATA + "budget: 4\n", r":6: budget: 4 is not text or a table of keys\.$"),
    "wrong type of a number": (WHOLE + "samples: many\n", r":7: samples: 'many' is not a whole number\.$"),
    "truth is no number": (WHOLE + "seed: true\n", r":7: seed: True is not a whole number\.$"),
    "a number is no truth": (
        WHOLE + "export:\n  external_data: 1\n",
        r":8: export\.external_data: 1 is not true or false\.$",
    ),
    "wrong type of a section": ("model: net.py\n" + DATA + BUDGET, r":1: model: 'net\.py' is not a table of keys\.$"),
    "nothing after a key": (WHOLE + "output:\n", r":7: output: None is not text\.$"),
    "missing budget": (MODEL + DATA, r"recipe\.yaml: the key 'budget' is missing; a recipe needs model, budget\.$"),
    "missing model": (DATA + BUDGET, r"recipe\.yaml: the key 'model' is missing"),
    "no python": ("model:\n  weights: w\n" + DATA + BUDGET, r":1: model: needs python; found none\.$"),
    "two sources": (
        MODEL + DATA + "  python: d.py:data\n" + BUDGET,
        r":3: calibration: needs npz or python or text; found npz and python\.$",
    ),
    "no source": (
        MODEL + "calibration:\n  select: some\n" + BUDGET,
        r":3: calibration: needs npz or python or text; found none\.$",
    ),
    "no inputs": (
        MODEL + "calibration:\n  npz: x.npz\n" + BUDGET,
        r":3: calibration: needs 'inputs': the array \(or arrays\) of the npz file that the model takes\.$",
    ),
    "no labels": (
        WHOLE + "evaluate:\n  npz: x.npz\n  inputs: images\n",
        r":7: evaluate: needs 'labels': the array of the npz file with the right answers\.$",
    ),
    "key twice": (WHOLE + "budget: 3 bits\n", r":7: budget: stands here and on line 6\. Keep one of them\.$"),
    "key twice in a section": (
        MODEL + "  python: other.py:build\n" + DATA + BUDGET,
        r":3: model\.python: stands here and on line 2\. Keep one of them\.$",
    ),
    "key twice, spelled differently": (WHOLE + "'budget': 3 bits\n", r":7: budget: stands here and on line 6"),
    "bad YAML": (MODEL + "  - python\n" + DATA, r":3: not valid YAML: "),
    "unclosed bracket": (WHOLE + "schemes: [w4a8\n", r":8: not valid YAML: "),
    "tab": (MODEL + "\tweights: w\n", r":3: not valid YAML: found character '\\t'"),
    "a date that is none": (WHOLE + "seed: 2024-13-45\n", r"recipe\.yaml: not valid YAML: month must be in"),
    "code": (
        WHOLE + "seed: !!python/object/apply:os.getpid []\n",
        r":7: not valid YAML: could not determine a constr",
    ),
    "refers to itself": ("model: &m\n  python: *m\n", r"recipe\.yaml: not valid YAML: a key refers to itself"),
    "a list": (
        "- model\n",
        r"recipe\.yaml: a recipe is a table of keys; known keys: model, calibration, example_inputs, evaluate",
    ),
    "empty": ("", r"recipe\.yaml: a recipe is a table of keys"),
}


@pytest.mark.parametrize(("text", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_name_the_place(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "recipe.yaml"))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"^Cannot read the recipe '.*none\.yaml': No such file or directory\.$"):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"budget: 4 bits # gr\xf6\xdfe\n")
    with pytest.raises(InvalidRequest, match=r"^Cannot read the recipe '.*latin\.yaml': .*can't decode byte"):
        read_recipe(tmp_path / "latin.yaml")
    with pytest.raises(InvalidRequest, match=r"^Cannot read the recipe '.*': Is a directory\.$"):
        read_recipe(tmp_path)


def test_changes_override_and_add(tmp_path: Path) -> None:
    changes = (
        "budget=3 bits, 300 KB",
        "model.weights=other.safetensors",
        "schemes=[w2a8, w8a8]",
        "rules={head: float}",
        "evaluate.python=e.py:f",
        "seed=7",
        "seed=8",
    )
    recipe = read(tmp_path, WHOLE, *changes)
    assert recipe.data["model"] == {"python": "net.py:build", "weights": "other.safetensors"}
    assert recipe.data["evaluate"] == {"python": "e.py:f"}
    assert recipe.settings() == {
        "budget": "3 bits, 300 KB", "schemes": ["w2a8", "w8a8"], "rules": {"head": "float"}, "seed": 8,
    }  # fmt: skip


CHANGES = {
    "no value": ("budget", r"^--set 'budget' is not key=value, such as --set budget='3 bits'\.$"),
    "no key": ("=3 bits", r"^--set '=3 bits' is not key=value"),
    "an empty step": ("model..python=x", r"^--set 'model\.\.python=x' is not key=value"),
    "below a text": (
        "budget.size=3 KB",
        r"^--set 'budget\.size=3 KB': 'budget' in '.*recipe\.yaml' is not a table\.$",
    ),
    "bad YAML": ("schemes=[w4a8", r"^--set 'schemes=\[w4a8': the value is not valid YAML\.$"),
    "a date that is none": ("seed=2024-13-45", r"^--set 'seed=2024-13-45': the value is not valid YAML\.$"),
    "unknown key": ("buget=3 bits", r"recipe\.yaml:--set: buget: unknown key\. Did you mean 'budget'"),
    "unknown nested key": (
        "model.wights=w",
        r"recipe\.yaml:--set: model\.wights: unknown key\. Did you mean 'weights'",
    ),
    "wrong type": ("samples=few", r"recipe\.yaml:--set: samples: 'few' is not a whole number"),
    "no value after =": ("budget=", r"recipe\.yaml:--set: budget: None is not text or a table of keys"),
    "a section of its own": (
        "evaluate.metric=top1",
        r"recipe\.yaml:--set: evaluate: needs npz or python; found none",
    ),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_change_that_cannot_be_made(change: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=message):
        read(tmp_path, WHOLE, change)


PATHS = {
    "beside the recipe": ("data/w.safetensors", None, "RECIPE/data/w.safetensors"),
    "above it": ("../w.safetensors", None, "w.safetensors"),
    "absolute": ("/data/w.safetensors", None, "/data/w.safetensors"),
    "variable": ("${QUANTKIT_DATA}/w.safetensors", "/data", "/data/w.safetensors"),
    "variable over default": ("${QUANTKIT_DATA:-../there}/w.safetensors", "/data", "/data/w.safetensors"),
    "default": ("${QUANTKIT_DATA:-../there}/w.safetensors", None, "there/w.safetensors"),
    "empty variable": ("${QUANTKIT_DATA:-../there}/w.safetensors", "", "there/w.safetensors"),
    "relative variable": ("${QUANTKIT_DATA}/w.safetensors", "mine", "RUN/mine/w.safetensors"),
}


@pytest.mark.parametrize(("written", "variable", "expected"), PATHS.values(), ids=PATHS)
def test_paths(written: str, variable: str | None, expected: str, tmp_path: Path, monkeypatch) -> None:
    for name in ("RECIPE", "RUN"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "RUN")
    monkeypatch.delenv("QUANTKIT_DATA", raising=False)
    if variable is not None:
        monkeypatch.setenv("QUANTKIT_DATA", variable)
    recipe = read(tmp_path / "RECIPE", WHOLE)
    assert recipe.resolved(written) == tmp_path / expected


def test_a_missing_file_names_its_key_and_the_variable(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("QUANTKIT_DATA", raising=False)
    recipe = read(tmp_path, WHOLE.replace("x.npz", "${QUANTKIT_DATA:-data}/x.npz"))
    file = re.escape(str(tmp_path / "data" / "x.npz"))
    hint = r" Set QUANTKIT_DATA to the folder of the data\.$"
    with pytest.raises(InvalidRequest, match=rf"recipe\.yaml:4: calibration\.npz: there is no file '{file}'\.{hint}"):
        recipe.path_of("calibration", "npz")
    (tmp_path / "x.npz").mkdir()
    with pytest.raises(InvalidRequest, match=r"recipe\.yaml:4: calibration\.npz: there is no file '.*x\.npz'\.$"):
        read(tmp_path, WHOLE).path_of("calibration", "npz")
