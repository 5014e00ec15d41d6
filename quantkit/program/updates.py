"""What a pass through a model must find and leave as it was: torch's modes, and the state that a forward updates."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def plain_mode(model: nn.Module) -> Iterator[None]:
    """Run the block without gradients, inference mode and autocast, whatever the caller's code is wrapped in."""
    with torch.inference_mode(False), torch.no_grad(), without_autocast(model):
        yield


def without_autocast(model: nn.Module) -> torch.autocast:
    """A block that computes in the types of its tensors, on the device of a model."""
    return torch.autocast(next((p.device.type for p in model.parameters() if not p.is_meta), "cpu"), enabled=False)


def named_state(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a model by all their names."""
    found = dict(model.named_parameters(remove_duplicate=False))
    return found | dict(model.named_buffers(remove_duplicate=False))


def _holders(model: nn.Module) -> Iterator[tuple[str, dict[str, Any], str, Tensor]]:
    """(name, the dictionary that holds it, its key, the tensor) of every tensor of a model but its parameters:
    buffers, and plain attributes of modules.
    """
    for name, module in model.named_modules():
        for holder in (module._buffers, vars(module)):
            for key, value in holder.items():
                if isinstance(value, Tensor):
                    yield (f"{name}.{key}" if name else key), holder, key, value


@contextmanager
def restored(model: nn.Module, names: Collection[str] | None = None) -> Iterator[list[str]]:
    """Give the model's buffers and tensor attributes back what they held before the block: those named, or all.

    Yields a list that has, after the block, the names of those that had changed.
    """
    before = [
        (name, holder, key, tensor, -1 if tensor.is_inference() else tensor._version)
        for name, holder, key, tensor in _holders(model)
        if names is None or name in names
    ]
    copies = {name: tensor.detach().clone() for name, _, _, tensor, _ in before}
    changed: list[str] = []
    try:
        yield changed
    finally:
        for name, holder, key, tensor, version in before:
            written = tensor.is_inference() or tensor._version != version
            same = holder.get(key) is tensor
            if same and not (written and not torch.equal(tensor, copies[name])):
                continue
            changed.append(name)
            holder[key] = tensor
            with torch.no_grad(), torch.inference_mode(tensor.is_inference()):
                tensor.copy_(copies[name])
