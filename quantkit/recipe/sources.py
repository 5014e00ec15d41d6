"""What a recipe names: Python functions, a model with its weights, arrays of inputs and labels, a metric."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.utils._pytree import tree_map

from quantkit.errors import CorruptFile, did_you_mean
from quantkit.graph.batches import Batch, as_batch, split_batches
from quantkit.recipe.read import Recipe

BATCH = 128
Evaluate = Callable[[nn.Module], float]


def function_of(recipe: Recipe, *keys: str) -> Callable[..., Any]:
    """The function a key names: ``package.module:function``, or ``file.py:function`` relative to the recipe."""
    text = str(recipe.get(*keys))
    place, colon, name = text.rpartition(":")
    if not colon or not name.isidentifier():
        raise recipe.error(keys, f"{text!r} is not package.module:function or file.py:function.")
    module = _module(recipe, keys, place)
    found = getattr(module, name, None)
    if not callable(found):
        known = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise recipe.error(keys, f"{place!r} has no function {name!r}.{did_you_mean(name, known)}")
    return found


def _module(recipe: Recipe, keys: Sequence[str], place: str) -> ModuleType:
    if place.endswith(".py"):
        return _module_of_file(recipe, keys, recipe.resolved(place))
    folders = [str(Path.cwd()), str(recipe.path.parent.resolve())]
    added = [folder for folder in folders if folder not in sys.path]
    sys.path[:0] = added
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        raise recipe.error(keys, f"{error}. Python looks in the current directory and beside the recipe.") from error
    finally:
        for folder in added:
            sys.path.remove(folder)


def _module_of_file(recipe: Recipe, keys: Sequence[str], file: Path) -> ModuleType:
    if not file.is_file():
        raise recipe.error(keys, f"there is no file {str(file)!r}.")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise recipe.error(keys, f"{str(file)!r} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model_of(recipe: Recipe) -> nn.Module:
    """The recipe's model with its weights."""
    model = function_of(recipe, "model", "python")()
    if not isinstance(model, nn.Module):
        raise recipe.error(("model", "python"), f"returned {type(model).__name__}, not a torch module.")
    if recipe.get("model", "weights") is None:
        return model
    path = recipe.path_of("model", "weights")
    try:
        model.load_state_dict(load_file(path))
    except SafetensorError as error:
        raise CorruptFile(f"{str(path)!r} is damaged or not a safetensors file ({error}).") from error
    except RuntimeError as error:
        raise recipe.error(("model", "weights"), f"the weights do not fit the model: {error}") from error
    return model


@dataclass(frozen=True)
class Samples:
    """Model inputs in batches, and the label of every sample where there are labels."""

    batches: list[Batch]
    labels: np.ndarray | None = None

    def first(self, count: int) -> Batch:
        """The first ``count`` samples as one batch."""
        return split_batches(self.batches, count)[0]


def samples_of(recipe: Recipe, section: str, batch: int = BATCH) -> Samples:
    """The inputs (and labels) a section names, or what its Python function returns (an iterable of model inputs)."""
    if recipe.get(section, "python") is not None:
        items = function_of(recipe, section, "python")()
        return Samples([as_batch(item) for item in items])
    arrays = _arrays(recipe, section)
    chosen = _selection(recipe, section, arrays)
    prepare = function_of(recipe, section, "preprocess") if recipe.get(section, "preprocess") else torch.from_numpy

    def tensor(name: str) -> torch.Tensor:
        value = prepare(np.ascontiguousarray(_array(recipe, (section, "inputs"), arrays, name)[chosen]))
        if not isinstance(value, torch.Tensor):
            raise recipe.error((section, "preprocess"), f"returned {type(value).__name__}, not a tensor.")
        return value

    inputs = recipe.get(section, "inputs")
    item = tree_map(tensor, tuple(inputs) if isinstance(inputs, list) else inputs)
    labels = recipe.get(section, "labels")
    return Samples(
        split_batches([as_batch(item)], batch),
        None if labels is None else _array(recipe, (section, "labels"), arrays, labels)[chosen],
    )


def _arrays(recipe: Recipe, section: str) -> Mapping[str, np.ndarray]:
    path = recipe.path_of(section, "npz")
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (ValueError, OSError, EOFError) as error:
        raise CorruptFile(f"{str(path)!r} is damaged or not an npz file ({error}).") from error


def _array(recipe: Recipe, keys: Sequence[str], arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in arrays:
        raise recipe.error(keys, f"the file has no array {name!r}; it has {', '.join(arrays)}.")
    return arrays[name]


def _selection(recipe: Recipe, section: str, arrays: Mapping[str, np.ndarray]) -> Any:
    """Which samples: all, those of an index array in the file, or a [start, stop] range."""
    select = recipe.get(section, "select")
    if select is None:
        return slice(None)
    if isinstance(select, str):
        return _array(recipe, (section, "select"), arrays, select)
    if len(select) != 2 or not all(isinstance(v, int) for v in select) or not 0 <= select[0] < select[1]:
        raise recipe.error((section, "select"), f"{select} is not the name of an index array or [start, stop].")
    return slice(*select)


def evaluate_of(recipe: Recipe) -> tuple[Evaluate, Samples | None] | None:
    """(model -> metric, the evaluation data where the recipe names arrays); None where it evaluates nothing."""
    if recipe.get("evaluate") is None:
        return None
    if recipe.get("evaluate", "python") is not None:
        return function_of(recipe, "evaluate", "python"), None
    name = recipe.get("evaluate", "metric", default="top1")
    if name not in METRICS:
        raise recipe.error(("evaluate", "metric"), f"unknown metric {name!r}; known: {', '.join(METRICS)}.")
    samples, metric = samples_of(recipe, "evaluate"), METRICS[name]
    return lambda model: metric(model, samples), samples


def outputs_of(model: nn.Module, samples: Samples) -> Iterator[torch.Tensor]:
    """The first output tensor for each batch."""
    with torch.no_grad():
        for args, kwargs in samples.batches:
            result = model(*args, **kwargs)
            while not isinstance(result, torch.Tensor):
                result = next(iter(result.values() if isinstance(result, Mapping) else result))
            yield result


def top1(model: nn.Module, samples: Samples) -> float:
    """Percent of samples whose largest output is their label."""
    found = np.concatenate([output.argmax(-1).numpy() for output in outputs_of(model, samples)])
    return float(100 * np.mean(found == samples.labels))


METRICS: dict[str, Callable[[nn.Module, Samples], float]] = {"top1": top1}
