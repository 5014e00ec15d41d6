"""The tensors that a model takes by name, their shapes, and which sizes vary from batch to batch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_unflatten

from quantkit.program.inputs import Batch, batch_size
from quantkit.program.intercept import tensors_of

InputShapes = dict[str, tuple[int, ...]]
Place = tuple[str, int]  # an input and an axis of it
MOST_FORMS = 4


def leaf_names(value: Any, root: str) -> tuple[str, ...]:
    """A name for each tensor of a nested value: keys and positions joined by dots, after ``root`` if no key leads."""
    names = []
    for path, leaf in tree_flatten_with_path(value)[0]:
        if isinstance(leaf, Tensor):
            parts = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
            names.append(".".join(parts if parts and not parts[0].isdigit() else [root, *parts]))
    return tuple(names)


def input_names(model: nn.Module, batch: Batch) -> tuple[str, ...]:
    """The names of a batch's tensors: the model's own argument names."""
    args, kwargs = batch
    positional: list[str] = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional += [f"{parameter.name}.{i}" for i in range(len(args) - len(positional))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            positional.append(parameter.name)
    return leaf_names(dict(zip(positional, args, strict=False)) | kwargs, "input")


def input_shapes(model: nn.Module, batch: Batch) -> InputShapes:
    """The shape of every tensor of a batch."""
    return {n: tuple(t.shape) for n, t in zip(input_names(model, batch), tensors_of(batch), strict=True)}


def form_of(batch: Batch) -> str:
    """The structure of a batch, with the types of its tensors and their shapes but for the number of samples."""
    leaves, structure = tree_flatten(batch)
    forms = [(leaf.dtype, leaf.shape[1:]) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return f"{structure} {forms}"


def distinct_forms(shapes: Sequence[InputShapes]) -> list[int]:
    """The positions of a few batches among which every size varies that varies among all of them, the first included.

    Batches that take other tensors than the first do not count.
    """
    chosen: list[int] = []
    for i, form in enumerate(shapes):
        if form.keys() != shapes[0].keys() or any(form == shapes[k] for k in chosen):
            continue
        known = varying_places([shapes[k] for k in chosen])
        if len(chosen) < MOST_FORMS or varying_places([*(shapes[k] for k in chosen), form]) - known:
            chosen.append(i)
    return chosen


def varying_forms(model: nn.Module, batches: Sequence[Batch]) -> tuple[InputShapes, ...]:
    """The shapes of a few batches among which every size varies that varies among all; none where nothing does but
    the number of samples.
    """
    shapes = [input_shapes(model, batch) for batch in batches]
    samples = {
        name for name in shapes[0] if all(_counts_samples(name, *one) for one in zip(batches, shapes, strict=True))
    }
    forms = tuple(shapes[i] for i in distinct_forms(shapes))
    return forms if any(axis or name not in samples for name, axis in varying_places(forms)) else ()


def _counts_samples(name: str, batch: Batch, shapes: InputShapes) -> bool:
    return shapes.get(name, ())[:1] == (batch_size(batch),)


def varying_places(shapes: Sequence[InputShapes]) -> set[Place]:
    """The axes of inputs along which batches have different sizes."""
    first, *others = shapes or [{}]
    ranks = {name: len(shape) for name, shape in first.items()}
    alike = [form for form in others if {name: len(shape) for name, shape in form.items()} == ranks]
    return {
        (name, axis)
        for name, shape in first.items()
        for axis, size in enumerate(shape)
        if any(form[name][axis] != size for form in alike)
    }


def resized(batch: Batch, names: Sequence[str], sizes: Mapping[Place, int]) -> Batch:
    """A batch with other sizes along some axes: cut off, or going on from the beginning. ``names`` are those of its
    tensors.
    """
    leaves, spec = tree_flatten(batch)
    name = iter(names)
    return tree_unflatten(
        [_resized(leaf, next(name), sizes) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec
    )


def _resized(tensor: Tensor, name: str, sizes: Mapping[Place, int]) -> Tensor:
    for axis, size in _sizes_of(name, sizes):
        if size != tensor.shape[axis]:
            tensor = tensor.index_select(axis, torch.arange(size, device=tensor.device) % tensor.shape[axis])
    return tensor


def _sizes_of(name: str, sizes: Mapping[Place, int]) -> Iterator[tuple[int, int]]:
    return ((axis, size) for (one, axis), size in sizes.items() if one == name)
