"""What a pass through a model must find and leave as it was: torch's modes, and the state that a forward updates."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_ABSENT = object()
_OF_MODULES = frozenset(vars(nn.Module()))  # attributes that every module has
_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_guard = threading.Lock()


@contextmanager
def own_modes() -> Iterator[None]:
    """Run the block in the modes in which torch starts a thread, whatever the caller's code is wrapped in."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield


def without_autocast(model: nn.Module) -> AbstractContextManager[Any]:
    """A block that computes in the types of its tensors, on the device of a model."""
    device = next((p.device.type for p in model.parameters() if not p.is_meta), "cpu")
    # where it is off nothing is entered: torch.export makes a part of its own of what runs in such a block
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


@contextmanager
def plain_mode(model: nn.Module) -> Iterator[None]:
    """Run the block without gradients, inference mode and autocast, whatever the caller's code is wrapped in."""
    with torch.inference_mode(False), torch.no_grad(), without_autocast(model):
        yield


@dataclass(frozen=True)
class _Held:
    """A buffer or a plain attribute of a module, with what is needed to tell whether it changed and to undo that."""

    name: str
    holder: dict[str, Any]
    key: str
    value: Any
    content: Any
    version: int

    @classmethod
    def of(cls, name: str, holder: dict[str, Any], key: str) -> _Held:
        value = holder[key]
        if isinstance(value, Tensor):
            version = -1 if value.is_inference() else value._version
            return cls(name, holder, key, value, value.detach().clone(), version)
        return cls(name, holder, key, value, value.copy() if type(value) in (list, dict) else None, 0)

    def changed(self) -> bool:
        if self.holder.get(self.key, _ABSENT) is not self.value:
            return True
        if isinstance(self.value, Tensor):
            unwritten = not self.value.is_inference() and self.value._version == self.version
            return not (unwritten or torch.equal(self.value, self.content))
        if isinstance(self.content, dict):
            return list(self.value) != list(self.content) or not _same(self.value.values(), self.content.values())
        return isinstance(self.content, list) and not _same(self.value, self.content)

    def put_back(self) -> None:
        self.holder[self.key] = self.value
        if isinstance(self.value, Tensor):
            with torch.no_grad(), torch.inference_mode(self.value.is_inference()):
                self.value.copy_(self.content)
        elif isinstance(self.content, dict):
            self.value.clear()
            self.value.update(self.content)
        elif isinstance(self.content, list):
            self.value[:] = self.content


def named_state(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a model by all their names."""
    found = dict(model.named_parameters(remove_duplicate=False))
    return found | dict(model.named_buffers(remove_duplicate=False))


def _same(found: Collection[Any], before: Collection[Any]) -> bool:
    return len(found) == len(before) and all(a is b for a, b in zip(found, before, strict=True))


def _places(model: nn.Module, names: Collection[str] | None) -> dict[str, tuple[dict[str, Any], str]]:
    """Name -> (the dictionary that holds it, its key), of all buffers and plain attributes, or those named."""
    found = {}
    for scope, module in model.named_modules():
        for holder in (module._buffers, vars(module)):
            for key in holder:
                name = f"{scope}.{key}" if scope else key
                if key not in _OF_MODULES and (names is None or name in names):
                    found[name] = (holder, key)
    return found


@contextmanager
def restored(model: nn.Module, names: Collection[str] | None = None) -> Iterator[list[str]]:
    """Give the model's buffers and plain attributes back what they held before the block: those named, or all.

    Yields a list that has, after the block, the names of those that had changed. Threads that would restore the same
    model wait for each other.
    """
    changed: list[str] = []
    if names is not None and not names:
        yield changed
        return
    with _guard:
        lock = _locks.setdefault(model, threading.RLock())
    with lock:
        before = {name: _Held.of(name, *place) for name, place in _places(model, names).items()}
        try:
            yield changed
        finally:
            for name, (holder, key) in _places(model, names).items():
                if name not in before:
                    changed.append(name)
                    del holder[key]
            for held in before.values():
                if held.changed():
                    changed.append(held.name)
                    held.put_back()
