"""Running a network or its file on batches, and how far the mean of what they score is by chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from quantkit.backends.onnxruntime.sessions import feeds, open_session

from .case import Run, arguments

DRAWS = 2000  # of the bootstrap


def in_onnxruntime(path: Path) -> Run:
    """What runs a file."""
    session = open_session(path, threads=1)
    return lambda batch: session.run(None, feeds(session, arguments(batch)))


def in_torch(model: nn.Module) -> Run:
    """What runs a network."""

    def run(batch: Any) -> list[np.ndarray]:
        args, kwargs = arguments(batch)
        with torch.no_grad():
            found = model(*args, **kwargs)
        return [x.numpy() for x in (found if isinstance(found, tuple) else (found,))]

    return run


def noise(first: np.ndarray, second: np.ndarray) -> float:
    """The bootstrap standard error of the difference between the means of two paired scores."""
    difference = first - second
    drawn = np.random.default_rng(0).integers(len(difference), size=(DRAWS, len(difference)))
    return float(difference[drawn].mean(axis=1).std())
