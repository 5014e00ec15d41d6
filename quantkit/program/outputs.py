"""Which tensor of a model's result it is judged by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten

from quantkit.errors import InvalidRequest


def main_output(result: Any) -> Tensor:
    """The tensor the damage is measured on: ``logits`` of a dict or record, else the first floating-point tensor."""
    named = result.get("logits") if isinstance(result, Mapping) else getattr(result, "logits", None)
    candidates = [named] if isinstance(named, Tensor) else tree_flatten(result)[0]
    for tensor in candidates:
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            return tensor
    raise InvalidRequest(
        "The model returns no floating-point tensor, so there is nothing to compare with the float model."
    )
