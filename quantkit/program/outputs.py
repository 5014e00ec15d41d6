"""The tensors of a model's result, and which of them its damage is measured on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten

from quantkit.errors import InvalidRequest


def results_of(value: Any) -> list[Tensor]:
    """All tensors of what a model returned, also those in dataclasses."""
    found = []
    for leaf in tree_flatten(value)[0]:
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found += results_of([getattr(leaf, field.name) for field in fields(leaf)])
    return found


def main_output(result: Any) -> Tensor:
    """The tensor the damage is measured on: ``logits`` of a dict or record, else the first floating-point tensor."""
    named = result.get("logits") if isinstance(result, Mapping) else getattr(result, "logits", None)
    candidates = [named] if isinstance(named, Tensor) else results_of(result)
    for tensor in candidates:
        if tensor.is_floating_point():
            return tensor
    raise InvalidRequest(
        "The model returns no floating-point tensor, so there is nothing to compare with the float model."
    )
