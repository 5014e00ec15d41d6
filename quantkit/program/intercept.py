"""Watching a model compute: every torch call inside a forward, with a key that is the same in every run.

The key of a call is (module scope, operation, how often that operation ran in that scope before): independent of
tensor addresses and names in the user's source, so what was found by tracing once can be found again when simulating
and exporting.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from quantkit.program.attention import can_decompose, decomposed_attention


@dataclass(frozen=True, order=True)
class OpKey:
    """One call of one operation, and which of its output tensors. ``str`` is the name users see:
    ``layer1.0/relu.1``.
    """

    scope: str
    op: str
    index: int = 0
    output: int = 0

    def __str__(self) -> str:
        count = f".{self.index}" if self.index else ""
        part = f"[{self.output}]" if self.output else ""
        return f"{self.scope}/{self.op}{count}{part}"


Handler = Callable[[OpKey, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

_ALIASES = {
    "iadd": "add",
    "radd": "add",
    "imul": "mul",
    "rmul": "mul",
    "isub": "sub",
    "itruediv": "div",
    "truediv": "div",
}
_TRANSPOSES = ("T", "mT", "H", "mH")


def operation_name(func: Callable[..., Any]) -> str | None:
    """The plain name of a torch call (``__iadd__``, ``add_`` and ``add`` are all "add"); None for attribute reads,
    but for those that compute (``x.T``).
    """
    name = getattr(func, "__name__", "")
    if name == "__get__":
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        return attribute if attribute in _TRANSPOSES else None
    if name in ("__set__", "__delete__", ""):
        return None
    plain = name.strip("_")
    return _ALIASES.get(plain, plain)


class _Calls(TorchFunctionMode):
    """Routes torch calls to a handler while module hooks keep track of the scope."""

    def __init__(self, handler: Handler) -> None:
        super().__init__()
        self.handler = handler
        self.scopes = [""]
        self.counts: dict[tuple[str, str], int] = defaultdict(int)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        op = operation_name(func)
        if op is None:
            return func(*args, **kwargs)
        if can_decompose(op, args, kwargs):
            with self:
                return decomposed_attention(*args, **kwargs)
        scope = self.scopes[-1]
        index = self.counts[scope, op]
        self.counts[scope, op] += 1
        return self.handler(OpKey(scope, op, index), func, args, kwargs)


@contextmanager
def intercept(model: nn.Module, handler: Handler) -> Iterator[None]:
    """Send every torch call made inside ``model`` to ``handler(key, func, args, kwargs)``, whose result replaces the
    call's.

    Fused attention is taken apart: the handler gets its products and its softmax. The handler runs with interception
    off, so it may compute freely. Hooks are removed on the way out, whatever happens.
    """
    calls = _Calls(handler)
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # takes no hooks, and its calls are not seen anyway

        def enter(_module: nn.Module, _args: Any, name: str = name) -> None:
            calls.scopes.append(name)

        def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
            calls.scopes.pop()

        hooks.append(module.register_forward_pre_hook(enter))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    try:
        with calls:
            yield
    finally:
        for hook in hooks:
            hook.remove()


def map_tensors(value: Any, key: OpKey, change: Callable[[OpKey, Tensor], Tensor]) -> Any:
    """Apply ``change`` to every floating-point tensor of a (nested) output, with ``key.output`` counting all its
    tensors.
    """
    if isinstance(value, Tensor):
        return change(key, value) if value.is_floating_point() else value
    leaves, spec = tree_flatten(value)
    position = 0
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            if leaf.is_floating_point():
                leaves[i] = change(replace(key, output=position), leaf)
            position += 1
    return tree_unflatten(leaves, spec)


INPUT = OpKey("", "input")


def forward_parameters(model: nn.Module) -> list[inspect.Parameter]:
    """The parameters of the model's forward, in order; none where Python cannot tell (scripted models)."""
    try:
        return list(inspect.signature(model.forward).parameters.values())
    except ValueError:
        return []


def change_inputs(
    model: nn.Module, args: Any, kwargs: Any, change: Callable[[OpKey, Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Apply ``change`` to copies of every floating-point model input; keys are ``input``, ``input[1]``, ... in the
    order of the forward's parameters.
    """
    order = {parameter.name: i for i, parameter in enumerate(forward_parameters(model))}
    ordered = dict(sorted(kwargs.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))
    return map_tensors(own_inputs(args, ordered), INPUT, change)


READ = -1  # in a place, instead of the number of an output: what the call reads


def read_place(key: OpKey) -> OpKey:
    """The place of the tensor that a call reads first, as this call alone sees it."""
    return OpKey(key.scope, key.op, key.index, READ)


def change_read(
    key: OpKey, args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[OpKey, Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Apply ``change`` to the tensor that a call reads first."""
    if args and isinstance(args[0], Tensor):
        return (change(read_place(key), args[0]), *args[1:]), kwargs
    if isinstance(kwargs.get("input"), Tensor):
        return args, kwargs | {"input": change(read_place(key), kwargs["input"])}
    return args, kwargs


def own_inputs(args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copies of a model's inputs: one that works in place must not change the caller's data."""
    return tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, (tuple(args), dict(kwargs)))


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors of a nested value, in order."""
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]
