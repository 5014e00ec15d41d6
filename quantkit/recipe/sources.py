"""What a recipe names: Python functions, a model with its weights, arrays of inputs and labels, a metric."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.utils._pytree import tree_map

from quantkit.errors import CorruptFile, InvalidRequest, QuantkitError, did_you_mean
from quantkit.plan import digest_of
from quantkit.program.inputs import Batch, as_batch, batch_size, split_batches
from quantkit.program.outputs import main_output
from quantkit.recipe.read import Recipe
from quantkit.recipe.texts import text_batches
from quantkit.stages.metric import Evaluate

BATCH = 128


def function_of(recipe: Recipe, *keys: str) -> Callable[..., Any]:
    """The function a key names: ``package.module:function``, or ``file.py:function`` relative to the recipe."""
    text = str(recipe.get(*keys))
    place, colon, name = text.rpartition(":")
    if not colon or not name.isidentifier():
        raise recipe.error(keys, f"{text!r} is not package.module:function or file.py:function.")
    module = _module(recipe, keys, place)
    found: Any = getattr(module, name, None)
    if not callable(found):
        known = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise recipe.error(keys, f"{place!r} has no function {name!r}.{did_you_mean(name, known)}")

    def call(*arguments: Any) -> Any:
        with _users_code(recipe, keys):
            return found(*arguments)

    return call


@contextmanager
def _users_code(recipe: Recipe, keys: Sequence[str]) -> Iterator[None]:
    """What fails inside is the fault of what this key names."""
    try:
        yield
    except QuantkitError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise recipe.error(
            keys, f"{type(error).__name__}: {str(error).rstrip(' .')}. --debug shows where in the code it names."
        ) from error


def _module(recipe: Recipe, keys: Sequence[str], place: str) -> ModuleType:
    if place.endswith(".py"):
        return _module_of_file(recipe, keys, recipe.resolved(place))
    with _importable(Path.cwd(), recipe.path.parent.resolve()), _users_code(recipe, keys):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise recipe.error(
                keys, f"{error}. Python looks in the current directory and beside the recipe."
            ) from error


@contextmanager
def _importable(*folders: Path) -> Iterator[None]:
    added = [str(folder) for folder in folders if str(folder) not in sys.path]
    sys.path[:0] = added
    try:
        yield
    finally:
        for folder in added:
            sys.path.remove(folder)


def _module_of_file(recipe: Recipe, keys: Sequence[str], file: Path) -> ModuleType:
    if not file.is_file():
        raise recipe.error(keys, f"there is no file {str(file)!r}.")
    # A name of its own: the file may be called as something installed is, and so may a file of another recipe.
    name = f"recipe_{file.stem}_{digest_of(str(file))}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # for a name that ends in .py there always is one
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    with _importable(file.parent), _users_code(recipe, keys):
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
        found = " ".join(str(error).split())  # one paragraph of a list
        raise recipe.error(("model", "weights"), f"the weights do not fit the model: {found}") from error
    return model


@dataclass(frozen=True)
class Samples:
    """Model inputs in batches, and the label of every sample where there are labels."""

    batches: list[Batch]
    labels: np.ndarray | None = None


def samples_of(recipe: Recipe, section: str, model: nn.Module | None = None, batch: int = BATCH) -> Samples:
    """The inputs (and labels) a section names, what its Python function returns (an iterable of model inputs), or
    texts as the ``model`` takes them.
    """
    if recipe.get(section, "python") is not None:
        return _samples_of_function(recipe, section)
    if recipe.get(section, "text") is not None:
        assert model is not None, "tokens are those that it takes"
        return Samples(text_batches(recipe, section, model, function_of))
    arrays = _arrays(recipe, section)
    prepare = function_of(recipe, section, "preprocess") if recipe.get(section, "preprocess") else torch.from_numpy

    def chosen(key: str, name: str) -> np.ndarray:
        array = _array(recipe, (section, key), arrays, name)
        return array[_selection(recipe, section, arrays, len(array) if array.ndim else 0)]

    def tensor(name: str) -> torch.Tensor:
        value = prepare(np.ascontiguousarray(chosen("inputs", name)))
        if not isinstance(value, torch.Tensor):
            raise recipe.error((section, "preprocess"), f"returned {type(value).__name__}, not a tensor.")
        return value.float() if value.is_floating_point() else value

    inputs = recipe.get(section, "inputs")
    item = as_batch(tree_map(tensor, tuple(inputs) if isinstance(inputs, list) else inputs))
    name = recipe.get(section, "labels")
    labels = None if name is None else chosen("labels", name)
    if labels is not None and len(labels) != batch_size(item):
        raise recipe.error((section, "labels"), f"{len(labels)} labels for {batch_size(item)} inputs.")
    return Samples(split_batches([item], batch), labels)


def _samples_of_function(recipe: Recipe, section: str) -> Samples:
    keys = (section, "python")
    items = function_of(recipe, *keys)()
    if isinstance(items, torch.Tensor | Mapping):
        items = [items]  # one item of many samples
    found: list[Batch] = []
    samples, most = 0, 1 if section == "example_inputs" else recipe.get("samples", default=float("inf"))
    with _users_code(recipe, keys), recipe.blame(*keys):
        for item in items:  # it may never end: ``samples`` is how much of it is wanted
            found.append(as_batch(item))
            samples += batch_size(found[-1])
            if samples >= most:
                break
    return Samples(found)


def _arrays(recipe: Recipe, section: str) -> Mapping[str, np.ndarray]:
    path = recipe.path_of(section, "npz")
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise ValueError("it holds one array without a name")
        with file:
            return dict(file)
    except (ValueError, OSError, EOFError, BadZipFile, zlib.error) as error:
        raise CorruptFile(f"{str(path)!r} is damaged or not an npz file ({error}).") from error


def _array(recipe: Recipe, keys: Sequence[str], arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in arrays:
        raise recipe.error(keys, f"the file has no array {name!r}; it has {', '.join(arrays)}.")
    return arrays[name]


def _selection(recipe: Recipe, section: str, arrays: Mapping[str, np.ndarray], count: int) -> np.ndarray:
    """The indices of the wanted of ``count`` samples: all, those of an index array in the file, or a range."""
    keys = (section, "select")
    select = recipe.get(*keys)
    if isinstance(select, str):
        indices = _array(recipe, keys, arrays, select)
        if indices.dtype == bool and indices.shape == (count,):
            indices = np.flatnonzero(indices)
        if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
            raise recipe.error(keys, f"the array {select!r} does not hold the numbers of samples.")
    elif select is None:
        indices = np.arange(count)
    elif len(select) == 2 and all(type(v) is int for v in select) and 0 <= select[0] <= select[1]:
        indices = np.arange(*select)
    else:
        raise recipe.error(keys, f"{select} is not the name of an index array or [start, stop].")
    if not indices.size:
        raise recipe.error(keys if select else (section,), "selects no sample. Choose at least one.")
    if indices.max() >= count or indices.min() < -count:
        raise recipe.error(keys, f"asks for sample {indices.max()}, and the file has {count}, numbered from 0.")
    return indices.astype(np.int64)


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
    """For each batch the output that damage is measured on."""
    for args, kwargs in samples.batches:
        with torch.no_grad():  # not around the loop: two of these may run in turn
            result = model(*args, **kwargs)
        yield main_output(result)


def top1(model: nn.Module, samples: Samples) -> np.ndarray:
    """For each sample 100 where its largest output is its label, 0 otherwise: the mean is a percentage."""
    found = np.concatenate([output.argmax(-1).cpu().numpy() for output in outputs_of(model, samples)])
    if samples.labels is None or found.shape != samples.labels.shape:
        expected = None if samples.labels is None else samples.labels.shape
        raise InvalidRequest(
            f"top1 compares one class a sample with its label: the outputs give {found.shape}, the labels {expected}."
        )
    return 100.0 * (found == samples.labels)


METRICS: dict[str, Callable[[nn.Module, Samples], np.ndarray]] = {"top1": top1}
