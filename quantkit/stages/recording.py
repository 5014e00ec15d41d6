"""A model's forward on tape, with all calibration samples as one batch: what rounding and learning play from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from quantkit.program.inputs import Batch, batch_size
from quantkit.program.segments import Segment, blocks_of
from quantkit.program.tape import Tape, record
from quantkit.sensitivity.outputs import main_output
from quantkit.transforms.prepare import Prepared

SIZE = 64  # samples played at once


@dataclass(frozen=True)
class Recording:
    """The tape of a model, its blocks, and the calibration samples."""

    tape: Tape
    blocks: list[Segment]
    samples: Batch


def recording_of(ready: Prepared, batches: Sequence[Batch]) -> Recording | str:
    """The recording of a model, or why it cannot be recorded."""
    if not batches:
        return "there is no calibration data"
    samples = _stacked(batches)
    if samples is None:
        return "its inputs cannot be put into batches of one size"
    order = torch.arange(batch_size(samples))
    size = min(SIZE, len(order))
    tape = record(
        ready.model, some_samples(samples, order[:size]), some_samples(samples, order.flip(0)[:size]), main_output
    )
    if tape is None:
        return "what it computes depends on more than its inputs' values and batch size"
    blocks = blocks_of(tape, ready.trace, ready.quantizable, {site.place for site in ready.sites})
    return Recording(tape, blocks, samples)


def some_samples(batch: Batch, indices: Tensor) -> Batch:
    """Samples of a batch, again from the first where indices pass the last."""
    return tree_map(lambda tensor: tensor[indices % len(tensor)], batch)


def _stacked(batches: Sequence[Batch]) -> Batch | None:
    """All samples as one batch, where every argument is a tensor with a row per sample."""
    flat = [tree_flatten(batch) for batch in batches]
    columns = list(zip(*(leaves for leaves, _ in flat), strict=False))
    sizes = [batch_size(batch) for batch in batches]
    same = all(spec == flat[0][1] for _, spec in flat)
    if not same or not all(_is_column(column, sizes) for column in columns):
        return None
    return tree_unflatten([torch.cat(list(column)) for column in columns], flat[0][1])


def _is_column(column: Sequence[Any], sizes: Sequence[int]) -> bool:
    tensors = [t for t in column if isinstance(t, Tensor) and t.dim()]
    return (
        len(tensors) == len(column)
        and [len(t) for t in tensors] == list(sizes)
        and len({(t.shape[1:], t.dtype) for t in tensors}) == 1
    )
