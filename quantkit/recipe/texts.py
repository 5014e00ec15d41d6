"""Texts of a recipe: a file of them and a tokenizer, as batches that the model takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from quantkit.errors import CorruptFile
from quantkit.program.inputs import Batch, as_batch
from quantkit.program.texts import as_tokens
from quantkit.recipe.read import Recipe

FIELD = "text"  # of a line that is a table, where the recipe names none
TOKENIZER_FILE = "tokenizer.json"


def text_batches(recipe: Recipe, section: str, model: nn.Module, function: Callable[..., Any]) -> list[Batch]:
    """The texts that a section names, up to ``samples``, as batches of tokens for ``model``; ``function(recipe,
    *keys)`` is what a key names in Python.
    """
    texts, tokenizer = texts_of(recipe, section), _tokenizer(recipe, section, function)
    most = 1 if section == "example_inputs" else recipe.get("samples")
    with recipe.blame(section):
        return [as_batch(item) for item in as_tokens(model, texts, tokenizer, most)]


def texts_of(recipe: Recipe, section: str) -> list[str]:
    """The texts of a file: the items of a list in JSON, the lines in JSON of a ``.jsonl`` file, or the lines of any
    other. An item that is a table has the text under the section's ``field``. Lines with nothing in them are left out.
    """
    path = recipe.path_of(section, "text")
    try:
        whole = path.read_text(encoding="utf-8")
        lines = [line for line in whole.splitlines() if line.strip()]
        if path.suffix == ".json":
            items = json.loads(whole)
        else:
            items = [json.loads(line) for line in lines] if path.suffix == ".jsonl" else lines
    except (OSError, ValueError) as error:
        raise CorruptFile(f"{str(path)!r} is damaged or holds no texts ({error}).") from error
    field = recipe.get(section, "field", default=FIELD)
    if not isinstance(items, list) or not items:
        raise recipe.error((section, "text"), f"{str(path)!r} holds no list of texts.")
    texts: list[str] = []
    for number, item in enumerate(items):
        text = item.get(field) if isinstance(item, dict) else item
        if not isinstance(text, str):
            known = f"; it has {', '.join(item)}" if isinstance(item, dict) else ""
            raise recipe.error((section, "text"), f"item {number} has no text under {field!r}{known}.")
        texts.append(text)
    return texts


def _tokenizer(recipe: Recipe, section: str, function: Callable[..., Any]) -> Any:
    """What the section's ``tokenizer`` names: a tokenizer.json file, a folder with one, or a function that returns a
    tokenizer.
    """
    keys = (section, "tokenizer")
    text = str(recipe.get(*keys))
    path = recipe.resolved(text)
    if not (text.endswith(".json") or path.is_dir()):
        return function(recipe, *keys)()
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise recipe.error(keys, "reading it needs the package tokenizers: pip install tokenizers.") from error
    file: Path = path / TOKENIZER_FILE if path.is_dir() else recipe.path_of(*keys)
    if not file.is_file():
        raise recipe.error(keys, f"there is no file {str(file)!r}.")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # whatever the reader in Rust raises
        raise CorruptFile(f"{str(file)!r} is damaged or not a tokenizer ({error}).") from error
