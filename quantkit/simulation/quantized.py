"""A quantized model as its user knows it: attributes, methods and submodules are those of the module that was
quantized, and whatever of them is called computes quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import wraps
from types import MethodType
from typing import Any, Protocol

from torch import Tensor, nn

from quantkit.program.intercept import tensors_of


class Quantizing(Protocol):
    """What carries out a quantized model: ``model`` is the module; it computes quantized inside ``quantizing()``."""

    model: nn.Module

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def quantizing(self, outside: Sequence[Tensor] = ()) -> AbstractContextManager[None]: ...


class QuantizedModel(nn.Module):
    """``module``, the model of ``state`` or a part of it, computing quantized. What is set here is set there."""

    _quantkit_module: nn.Module

    def __init__(self, module: nn.Module, state: Quantizing) -> None:
        super().__init__()
        self._modules["_quantkit_module"] = module
        self.__dict__["_quantkit_state"] = state  # no submodule: the user's parameters are counted once
        self.training = module.training

    @classmethod
    def of(cls, state: Quantizing) -> QuantizedModel:
        """The whole model of ``state``."""
        found: QuantizedModel = _as_user_sees(state.model, state)
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state, module = self._quantkit_state, self._quantkit_module
        if module is state.model:
            return state(*args, **kwargs)
        with state.quantizing(tensors_of((args, kwargs))):
            return module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):
                raise  # how Python copies or pickles the module is not how this one is
        module, state = self._quantkit_module, self._quantkit_state
        found = getattr(module, name)
        own = isinstance(found, MethodType) and found.__self__ is module
        return _quantizing(found, state) if own else _as_user_sees(found, state)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "training" or name.startswith("_"):
            super().__setattr__(name, value)
        else:
            setattr(self._quantkit_module, name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._quantkit_module)})


class QuantizedContainer(QuantizedModel):
    """One that holds others by position or name."""

    def __getitem__(self, key: Any) -> Any:
        return _as_user_sees(self._quantkit_module[key], self._quantkit_state)  # type: ignore[index]

    def __len__(self) -> int:
        return len(self._quantkit_module)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        return True

    def __contains__(self, key: Any) -> bool:
        return key in self._quantkit_module  # type: ignore[operator]

    def __iter__(self) -> Iterator[Any]:
        for item in self._quantkit_module:  # type: ignore[attr-defined]
            yield _as_user_sees(item, self._quantkit_state)


def _as_user_sees(found: Any, state: Quantizing) -> Any:
    """What is found in a model: modules compute quantized, all else is itself."""
    if not isinstance(found, nn.Module):
        return found
    kind = QuantizedContainer if hasattr(type(found), "__getitem__") else QuantizedModel
    return kind(found, state)


def _quantizing(method: Callable[..., Any], state: Quantizing) -> Callable[..., Any]:
    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with state.quantizing(tensors_of((args, kwargs))):
            return _as_user_sees(method(*args, **kwargs), state)

    return call
