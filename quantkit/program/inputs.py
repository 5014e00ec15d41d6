"""Calibration data as the model takes it: read once, checked, kept on the CPU."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from quantkit.errors import InvalidRequest
from quantkit.program.intercept import tensors_of
from quantkit.program.positions import Positions

PIECE = 1 << 20  # elements
Batch = tuple[tuple[Any, ...], dict[str, Any]]


def as_batch(item: Any) -> Batch:
    """(args, kwargs) of one calibration item: a tensor is one argument, a tuple or list several, a dict keywords.
    Arrays of numpy count as tensors, at any depth.
    """
    if isinstance(item, Tensor | np.ndarray):
        return (_tensor(item),), {}
    if isinstance(item, Mapping):  # batches are told apart by their leaves: always in one order
        return (), {key: tree_map(_tensor, value) for key, value in sorted(item.items())}
    if isinstance(item, tuple | list):
        return tuple(tree_map(_tensor, value) for value in item), {}
    texts = " Texts need a tokenizer: pass tokenizer= beside them." * isinstance(item, str)
    raise InvalidRequest(
        f"A calibration item must be a tensor, a tuple of arguments or a dict of keywords, not {type(item).__name__}."
        f"{texts}"
    )


def _tensor(value: Any) -> Any:
    """An array as a tensor of its own memory; anything else is itself."""
    if not isinstance(value, np.ndarray):
        return value
    try:
        return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))
    except TypeError as error:
        raise InvalidRequest(
            f"A calibration array holds {value.dtype}, which is no type of numbers that torch knows. Convert it, as "
            "by array.astype('float32')."
        ) from error


def read_batches(model: nn.Module, calibration: Any, samples: int | None = None) -> list[Batch]:
    """Read ``calibration`` (an iterable of items, or one tensor, array or dict of many samples) once, up to
    ``samples`` samples.

    Surplus trailing tuple items, as the labels of (x, y) loaders, are dropped with a notice. Floating-point inputs
    come out as float32 on the CPU. Raises InvalidRequest for empty data and for NaN or infinite inputs, with the
    batch's number.
    """
    _require_arguments(model, calibration, samples)
    items: Iterable[Any] = [calibration] if isinstance(calibration, Tensor | np.ndarray | Mapping) else calibration
    lazy = not isinstance(items, list | tuple)
    positions = Positions.of(model)
    batches: list[Batch] = []
    taken = most = read = 0
    for number, item in enumerate(items):
        read = number + 1
        args, kwargs = as_batch(item)
        most = max(most, len(args))
        batch = tree_map(lambda v: _on_cpu(v, copy=lazy), (positions.filled(args), kwargs))
        if samples is not None:
            batch = first_samples(batch, samples - taken)
        _require_usable(batch, number)
        if batch_size(batch):
            taken += batch_size(batch)
            batches.append(batch)
        if samples is not None and taken >= samples:
            break
    if taken == 0:
        items = "its item has" if read == 1 else f"its {read} items have"
        found = f"has no samples: {items} no tensor with some along its first axis" if read else "is empty"
        raise InvalidRequest(
            f"The calibration data {found}. Pass a few hundred typical inputs; labels are not needed."
        )
    positions.tell(most)
    return batches


def _require_arguments(model: Any, calibration: Any, samples: int | None) -> None:
    if not isinstance(model, nn.Module):
        raise InvalidRequest(f"The model must be a torch.nn.Module, not {type(model).__name__}.")
    if not isinstance(calibration, Iterable):
        indexed = hasattr(type(calibration), "__getitem__") and hasattr(type(calibration), "__len__")
        advice = " Pass torch.utils.data.DataLoader(dataset, batch_size=32), whose items are batches." * indexed
        raise InvalidRequest(
            f"calibration must be an iterable of model inputs, not {type(calibration).__name__}.{advice}"
        )
    if isinstance(calibration, tuple) and len({_look(item) for item in calibration}) > 1:
        raise InvalidRequest(
            "calibration is a tuple of tensors that differ in type or number of dimensions, and each item of it would "
            "be a batch of its own. Pass [(x, y)] for one batch of several arguments, or x alone."
        )
    if samples is not None and (not isinstance(samples, int) or samples < 1):
        raise InvalidRequest(f"samples={samples!r} is no number of samples: pass a whole one from 1, or None for all.")


def _look(item: Any) -> Any:
    """What all batches of one argument have in common."""
    if isinstance(item, Tensor):
        return item.is_floating_point(), item.dim()
    return (item.dtype.kind == "f", item.ndim) if isinstance(item, np.ndarray) else type(item)


def _on_cpu(value: Any, copy: bool) -> Any:
    """A tensor as float32 or integers on the CPU; ``copy`` where the iterable may fill the same memory again."""
    if not isinstance(value, Tensor):
        return value
    dtype = torch.float32 if value.is_floating_point() else value.dtype
    return value.detach().to("cpu", dtype, copy=copy)


def batch_size(batch: Batch) -> int:
    """Samples of a batch: the length of its first tensor with a dimension."""
    return next((len(t) for t in tensors_of(batch) if t.dim()), 0)


def first_samples(batch: Batch, count: int) -> Batch:
    """The first ``count`` samples of a batch; what does not have one entry per sample stays whole."""
    return picked_samples(batch, slice(count))


def picked_samples(batch: Batch, which: slice | Tensor) -> Batch:
    """Some samples of a batch, by their numbers; what does not have one entry per sample stays whole."""
    size = batch_size(batch)
    return tree_map(lambda v: v[which] if isinstance(v, Tensor) and v.dim() and len(v) == size else v, batch)


def numbered_samples(batches: Iterable[Batch], which: Callable[[Tensor], Tensor]) -> list[Batch]:
    """The samples for which ``which`` says so, given their numbers over all batches (samples,)."""
    found, start = [], 0
    for batch in batches:
        own = which(torch.arange(start, start + batch_size(batch), device="cpu"))
        start += len(own)
        if bool(own.any()):
            found.append(picked_samples(batch, own.nonzero().flatten()))
    return found


def _require_usable(batch: Batch, number: int) -> None:
    for tensor in tensors_of(batch):
        if tensor.is_nested or tensor.layout is not torch.strided:
            raise InvalidRequest(f"Calibration batch {number} contains a sparse or nested tensor: pass it dense.")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InvalidRequest(
                f"Calibration batch {number} contains NaN or infinite values. Remove or repair these inputs: "
                "ranges and sensitivities measured on them would mean nothing."
            )


def split_batches(batches: Sequence[Batch], size: int) -> list[Batch]:
    """The same samples in batches of at most ``size``, where every tensor of a batch has its number of samples."""
    result: list[Batch] = []
    for batch in batches:
        count = batch_size(batch)
        if count > size and all(tensor.dim() and len(tensor) == count for tensor in tensors_of(batch)):
            result += [picked_samples(batch, slice(start, start + size)) for start in range(0, count, size)]
        else:
            result.append(batch)
    return result


def stacked(batches: Sequence[Batch]) -> Batch | None:
    """All samples as one batch, where every argument is a tensor with a row per sample, or the same in all batches, as
    None and numbers are.
    """
    flat = [tree_flatten(batch) for batch in batches]
    if any(spec != flat[0][1] for _, spec in flat):
        return None
    columns = list(zip(*(leaves for leaves, _ in flat), strict=True))
    sizes = [batch_size(batch) for batch in batches]
    rows = [_is_column(column, sizes) for column in columns]
    if not all(
        row or all(_is_same(one, column[0]) for one in column) for row, column in zip(rows, columns, strict=True)
    ):
        return None
    leaves = [torch.cat(list(column)) if row else column[0] for row, column in zip(rows, columns, strict=True)]
    return tree_unflatten(leaves, flat[0][1])


def _is_column(column: Sequence[Any], sizes: Sequence[int]) -> bool:
    """Whether values of one argument, a batch each, are rows of one tensor."""
    tensors = [t for t in column if isinstance(t, Tensor) and t.dim()]
    return (
        len(tensors) == len(column)
        and [len(t) for t in tensors] == list(sizes)
        and len({(t.shape[1:], t.dtype) for t in tensors}) == 1
    )


def _is_same(one: Any, other: Any) -> bool:
    """Whether two values of an argument are equal and no tensors."""
    return type(one) is type(other) and not isinstance(one, Tensor) and bool(one == other)


def digest_batches(batches: Sequence[Batch]) -> str:
    """Identifies calibration data by its bytes."""
    hasher = hashlib.sha256()
    for batch in batches:
        leaves, structure = tree_flatten(batch)
        hasher.update(str(structure).encode())
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                hasher.update(str((leaf.dtype, tuple(leaf.shape))).encode())
                _update(hasher, leaf)
            else:
                hasher.update(repr(leaf).encode())
    return hasher.hexdigest()[:16]


def digests_of_samples(batch: Batch) -> list[str]:
    """Identifies each sample of a batch by the bytes of its row in every tensor that has one."""
    count = batch_size(batch)
    rows = [t.contiguous() for t in tensors_of(batch) if t.dim() and len(t) == count]
    found = []
    for i in range(count):
        hasher = hashlib.sha256()
        for tensor in rows:
            _update(hasher, tensor[i])
        found.append(hasher.hexdigest()[:16])
    return found


def digest_model(model: nn.Module) -> str:
    """Identifies a model by its class and the names, shapes and values of all tensors it holds: its state, buffers
    that are not part of it, and plain attributes of its modules.
    """
    hasher = hashlib.sha256(type(model).__qualname__.encode())
    held = {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, Tensor)
    }
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for name, tensor in sorted((held | buffers | dict(model.state_dict())).items()):
        if not isinstance(tensor, Tensor):
            hasher.update(f"{name}{tensor!r}".encode())
            continue
        hasher.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        _update(hasher, tensor)
    return hasher.hexdigest()[:16]


def _update(hasher: hashlib._Hash, tensor: Tensor) -> None:
    """Hash the bytes of a tensor, without a copy of the whole."""
    for part in pieces(tensor.detach()):
        hasher.update(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor in pieces of at most ``PIECE`` elements, in the order of its elements."""
    if tensor.numel() <= PIECE or not tensor.dim():
        yield from [tensor] if tensor.numel() else []
    elif (row := tensor.numel() // len(tensor)) > PIECE:
        for part in tensor:
            yield from pieces(part)
    else:
        yield from tensor.split(PIECE // row)
