"""What is known of a trained network: how it is calibrated, and how its task is scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

# A batch of inputs (a tensor, a tuple of arguments or a dict of keywords) -> every output.
Run = Callable[[Any], Sequence[np.ndarray]]
Scores = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """A trained network in eval mode.

    ``calibration`` are batches of one hundred samples or more; ``scores`` takes what runs a network, and gives the
    scores of each of its task's metrics for every item of the evaluation (an image, a clip, a sentence), in percent.
    The float network scores 100, unless the right answer is known. ``open_sizes`` are the axes of every input that
    vary, by the names that they share.
    """

    name: str
    model: nn.Module
    calibration: Sequence[Any]
    scores: Callable[[Run], Scores]
    open_sizes: Sequence[Mapping[int, str]]


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as positional and keyword arguments."""
    if isinstance(batch, dict):
        return (), batch
    return (batch if isinstance(batch, tuple) else (batch,)), {}


def samples(batches: Sequence[Any], most: int) -> list[tuple[Tensor, ...]]:
    """The first samples of these batches, each a batch of its own, as the tensors that the network takes."""
    found: list[tuple[Tensor, ...]] = []
    for batch in batches:
        args, kwargs = arguments(batch)
        given = (*args, *kwargs.values())
        found += [tuple(x[i : i + 1] for x in given) for i in range(len(given[0]))]
    return found[:most]
