"""All that a layer's call multiplies, as one matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantkit.rounding.layer_inputs import layer_inputs


def input_columns(kind: str, args: Any, kwargs: Any, generator: torch.Generator | None = None) -> Tensor:
    """The inputs (groups, rows, K) of a call of torch."""
    found = layer_inputs(kind, args, kwargs, generator)
    return found.columns(slice(0, found.width))
