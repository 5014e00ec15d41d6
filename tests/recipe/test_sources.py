"""What a recipe names: functions, weights, arrays, selections; each failure is the fault of a key with its line."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from quantkit.errors import CorruptFile, InvalidRequest
from quantkit.recipe.read import Recipe, read_recipe
from quantkit.recipe.run import inputs_of
from quantkit.recipe.sources import evaluate_of, function_of, model_of, samples_of
from quantkit.stages.metric import metric_of
from tests.recipe.tiny import rewritten, write_tiny
from tests.stages.networks import Small, images, small


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_tiny(tmp_path)


def recipe_with(path: Path, **changes: object) -> Recipe:
    return read_recipe(rewritten(path, **changes))


def test_the_recipe_as_it_is(path: Path) -> None:
    inputs = inputs_of(read_recipe(path))
    assert type(inputs.model) is Small  # of build, the weights from the file
    assert torch.equal(inputs.model.head.weight, small().head.weight)
    assert [len(args[0]) for args, _ in inputs.calibration.batches] == [24]
    assert torch.equal(inputs.calibration.batches[0][0][0], images(64)[:24])
    assert inputs.evaluation is not None
    assert [len(args[0]) for args, _ in inputs.evaluation.batches] == [40]
    assert inputs.evaluate is not None
    assert metric_of(inputs.evaluate, inputs.model) == 100


def test_without_evaluation(path: Path) -> None:
    inputs = inputs_of(recipe_with(path, evaluate=None))
    assert (inputs.evaluate, inputs.evaluation) == (None, None)


@pytest.mark.parametrize("beside_the_recipe", [True, False])
def test_a_function_of_a_module(beside_the_recipe: bool, path: Path, monkeypatch) -> None:
    folder = path.parent if beside_the_recipe else path.parent / "run"
    folder.mkdir(exist_ok=True)
    (folder / "module_of_a_recipe.py").write_text("def build():\n    import torch\n    return torch.nn.Linear(2, 3)\n")
    monkeypatch.chdir(path.parent / "data" if beside_the_recipe else folder)
    before = list(sys.path)
    try:
        recipe = recipe_with(path, model={"python": "module_of_a_recipe:build"})
        assert isinstance(model_of(recipe), nn.Linear)
    finally:
        sys.modules.pop("module_of_a_recipe", None)
    assert sys.path == before


def test_a_file_named_as_an_installed_module_does_not_stand_in_its_place(path: Path) -> None:
    (path.parent / "json.py").write_text("def build():\n    import torch\n    return torch.nn.Linear(2, 3)\n")
    assert isinstance(model_of(recipe_with(path, model={"python": "json.py:build"})), nn.Linear)
    assert not hasattr(sys.modules.get("json"), "build")


def test_a_file_may_import_its_neighbours(path: Path) -> None:
    (path.parent / "neighbour_of_a_recipe.py").write_text("WIDTH = 5\n")
    code = "import torch\nfrom neighbour_of_a_recipe import WIDTH\ndef build(): return torch.nn.Linear(2, WIDTH)\n"
    (path.parent / "first.py").write_text(code)
    try:
        assert model_of(recipe_with(path, model={"python": "first.py:build"})).out_features == 5
    finally:
        sys.modules.pop("neighbour_of_a_recipe", None)


FUNCTIONS = {
    "no colon": ("network.py", r"'network\.py' is not package\.module:function or file\.py:function\."),
    "no name": ("network.py:", r"'network\.py:' is not package\.module:function"),
    "a call": ("network.py:build()", r"'network\.py:build\(\)' is not package"),
    "missing file": ("net.py:build", r"there is no file '.*net\.py'\."),
    "missing module": (
        "no_such_package.net:build",
        r"No module named 'no_such_package'\. Python looks in the current",
    ),
    "missing function": ("network.py:biuld", r"'network\.py' has no function 'biuld'\. Did you mean 'build'"),
    "no function": ("network.py:NETWORK", r"'network\.py' has no function 'NETWORK'\."),
    "not a network": ("network.py:build_nothing", r"returned str, not a torch module\."),
    "wants arguments": ("network.py:build_with_arguments", r"TypeError: build_with_arguments\(\) missing 1 required"),
    "broken file": ("broken.py:build", r"SyntaxError: .*--debug shows where"),
    "failing file": ("failing.py:build", r"ZeroDivisionError: division by zero\. --debug shows where"),
}


@pytest.mark.parametrize(("text", "message"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_wrong_function(text: str, message: str, path: Path) -> None:
    (path.parent / "broken.py").write_text("def build(:\n")
    (path.parent / "failing.py").write_text("1 / 0\n")
    with pytest.raises(InvalidRequest, match=rf"tiny\.yaml:2: model\.python: {message}"):
        model_of(recipe_with(path, model__python=text))


def test_weights_that_do_not_fit(path: Path) -> None:
    recipe = recipe_with(path, model__python="network.py:build_other")
    with pytest.raises(
        InvalidRequest, match=r"tiny\.yaml:3: model\.weights: the weights do not fit the model: .*Miss"
    ):
        model_of(recipe)


@pytest.mark.parametrize("size", [0, 100, 2000])
def test_damaged_weights(size: int, path: Path) -> None:
    weights = path.parent / "data" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(CorruptFile, match=r"weights\.safetensors' is damaged or not a safetensors file"):
        model_of(read_recipe(path))


@pytest.mark.parametrize("kind", ["empty", "cut off", "changed", "another file", "one array"])
def test_damaged_arrays(kind: str, path: Path) -> None:
    file = path.parent / "data" / "images.npz"
    data = file.read_bytes()
    if kind == "one array":
        with file.open("wb") as opened:
            np.save(opened, np.zeros(3))
    else:
        changed = data[:400] + bytes(200) + data[600:]
        file.write_bytes({"empty": b"", "cut off": data[:-30], "changed": changed, "another file": b"GIF89a"}[kind])
    with pytest.raises(CorruptFile, match=r"images\.npz' is damaged or not an npz file"):
        samples_of(read_recipe(path), "calibration")


ARRAYS = {
    "missing inputs": (
        {"inputs": "image"},
        r"6: calibration\.inputs: the file has no array 'image'; it has images, l",
    ),
    "missing in a list": ({"inputs": ["images", "sounds"]}, r"6: calibration\.inputs: the file has no array 'sounds'"),
    "missing in a table": ({"inputs": {"x": "sounds"}}, r"6: calibration\.inputs: the file has no array 'sounds'"),
    "missing selection": (
        {"select": "train"},
        r"7: calibration\.select: the file has no array 'train'; it has images",
    ),
    "empty selection": ({"select": "nobody"}, r"7: calibration\.select: selects no sample\. Choose at least one\."),
    "empty range": ({"select": [5, 5]}, r"7: calibration\.select: selects no sample\."),
    "range beyond": ({"select": [100, 200]}, r"7: calibration\.select: asks for sample 199, and the file has 64"),
    "range partly beyond": ({"select": [60, 65]}, r"7: calibration\.select: asks for sample 64, and the file has 64"),
    "index beyond": (
        {"select": "far"},
        r"7: calibration\.select: asks for sample 64, and the file has 64, numbered f",
    ),
    "no numbers": ({"select": "halves"}, r"7: calibration\.select: the array 'halves' does not hold the numbers of"),
    "backwards": (
        {"select": [9, 2]},
        r"7: calibration\.select: \[9, 2\] is not the name of an index array or \[start",
    ),
    "negative": ({"select": [-9, 2]}, r"7: calibration\.select: \[-9, 2\] is not the name"),
    "three numbers": ({"select": [1, 2, 3]}, r"7: calibration\.select: \[1, 2, 3\] is not the name"),
    "words": ({"select": ["a", "b"]}, r"7: calibration\.select: \['a', 'b'\] is not the name"),
    "a number as inputs": ({"inputs": "number", "select": None}, r"4: calibration: selects no sample\."),
    "no tensor": (
        {"preprocess": "network.py:preprocess_badly"},
        r"8: calibration\.preprocess: returned ndarray, not a tensor\.",
    ),
    "failing preprocess": (
        {"preprocess": "network.py:build"},
        r"8: calibration\.preprocess: TypeError: build\(\) takes 0 positional arguments but 1 was given\.",
    ),
}


@pytest.mark.parametrize(("changes", "message"), ARRAYS.values(), ids=ARRAYS)
def test_arrays_that_cannot_be_had(changes: dict, message: str, path: Path) -> None:
    recipe = recipe_with(path, **{f"calibration__{key}": value for key, value in changes.items()})
    with pytest.raises(InvalidRequest, match=rf"tiny\.yaml:{message}") as caught:
        samples_of(recipe, "calibration")
    assert str(caught.value).count("tiny.yaml") == 1


def test_selections(path: Path) -> None:
    def taken(select: object) -> torch.Tensor:
        recipe = recipe_with(path, calibration__select=select, calibration__preprocess=None)
        return torch.cat([args[0] for args, _ in samples_of(recipe, "calibration", batch=9).batches])

    x = images(64)
    assert torch.equal(taken([3, 20]), x[3:20])
    assert torch.equal(taken("odd"), x[1::2])
    assert torch.equal(taken("calibration"), x[:24])
    assert torch.equal(taken(None), x)


@pytest.mark.parametrize(
    ("inputs", "args", "kwargs"),
    [("images", 1, []), (["images", "images"], 2, []), ({"left": "images", "right": "images"}, 0, ["left", "right"])],
)
def test_one_input_several_or_by_keyword(inputs: object, args: int, kwargs: list[str], path: Path) -> None:
    (batch,) = samples_of(recipe_with(path, calibration__inputs=inputs), "calibration").batches
    assert (len(batch[0]), list(batch[1])) == (args, kwargs)


def test_doubles_become_what_networks_take(path: Path) -> None:
    recipe = recipe_with(path, evaluate__inputs="doubles")
    inputs = inputs_of(recipe)
    assert inputs.evaluate is not None
    assert metric_of(inputs.evaluate, inputs.model) == 100


def test_data_of_a_function(path: Path) -> None:
    endless = recipe_with(path, calibration={"python": "network.py:batches"}, samples=20)
    assert [len(args[0]) for args, _ in samples_of(endless, "calibration").batches] == [8, 8, 8]
    tensor = recipe_with(path, calibration={"python": "network.py:one_tensor"})
    assert [args[0].shape for args, _ in samples_of(tensor, "calibration").batches] == [(8, 2, 6, 6)]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("build_with_arguments", r"TypeError: build_with_arguments\(\) missing"),
        ("build", r"TypeError: 'Small' object is not iterable"),
        ("build_nothing", r"A calibration item must be a tensor, a tuple of arguments or a dict of keywords, not str"),
    ],
)
def test_data_of_a_wrong_function(function: str, message: str, path: Path) -> None:
    recipe = recipe_with(path, calibration={"python": f"network.py:{function}"})
    with pytest.raises(InvalidRequest, match=rf"tiny\.yaml:\d+: calibration\.python: {message}") as caught:
        samples_of(recipe, "calibration")
    assert str(caught.value).count("tiny.yaml") == 1


EVALUATIONS = {
    "unknown metric": ({"metric": "top5"}, r"evaluate\.metric: unknown metric 'top5'; known: top1\."),
    "missing labels": ({"labels": "classes"}, r"evaluate\.labels: the file has no array 'classes'"),
    "too few labels": ({"labels": "few labels"}, r"evaluate\.select: asks for sample 63, and the file has 30"),
    "other number of labels": (
        {"labels": "few labels", "select": None},
        r"evaluate\.labels: 30 labels for 64 inputs\.",
    ),
    "empty selection": ({"select": "nobody"}, r"evaluate\.select: selects no sample\. Choose at least one\."),
}


@pytest.mark.parametrize(("changes", "message"), EVALUATIONS.values(), ids=EVALUATIONS)
def test_evaluations_that_cannot_be_made(changes: dict, message: str, path: Path) -> None:
    recipe = recipe_with(path, **{f"evaluate__{key}": value for key, value in changes.items()})
    with pytest.raises(InvalidRequest, match=rf"tiny\.yaml:\d+: {message}"):
        evaluate_of(recipe)


def test_labels_of_another_shape_than_the_outputs(path: Path) -> None:
    found = evaluate_of(recipe_with(path, evaluate__labels="images"))
    assert found is not None
    with pytest.raises(
        InvalidRequest, match=r"top1 compares one class a sample with its label: .*\(40,\).*\(40, 2, 6"
    ):
        found[0](small())


def test_a_function_that_evaluates(path: Path) -> None:
    found = evaluate_of(recipe_with(path, evaluate={"python": "network.py:brightness"}))
    assert found is not None
    with torch.no_grad():
        assert found[0](small()) == float(small()(torch.ones(4, 2, 6, 6)).mean())
    assert found[1] is None
    with pytest.raises(InvalidRequest, match=r"evaluate\.python: TypeError: .*--debug shows where"):
        found[0](None)  # type: ignore[arg-type]


def test_top1_of_a_network_with_several_outputs(path: Path) -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small()

        def forward(self, x):
            return {"count": torch.tensor(len(x)), "embedding": x, "logits": self.inner(x)}

    found = evaluate_of(read_recipe(path))
    assert found is not None
    assert metric_of(found[0], Several()) == 100


def test_functions_keep_what_they_return(path: Path) -> None:
    assert function_of(recipe_with(path, model__python="network.py:build_nothing"), "model", "python")() == "a network"
