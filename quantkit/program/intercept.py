"""Watching a model compute: every torch call inside a forward, with a key that is the same in every run.

The key of a call is (module scope, operation, how often that operation ran in that scope before): independent of
tensor addresses and names in the user's source, so what was found by tracing once can be found again when simulating
and exporting.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from quantkit.program.arguments import replaced
from quantkit.program.composites import parts_of
from quantkit.program.halves import in_float32, names_half, stores_halves, widened
from quantkit.program.tracing import calling


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
EnterModel = Callable[[Any, Any], tuple[tuple[Any, ...], dict[str, Any]]]
# What calls raise for sizes, devices and values that they do not take.
CALL_ERRORS = (RuntimeError, ValueError, TypeError, AssertionError, LookupError, AttributeError, ArithmeticError)
ReadShape = Callable[..., Any]  # (tensor, what its shape or size is read as, axis) -> what the model gets

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

    def __init__(
        self, handler: Handler, read_shape: ReadShape | None, enter_model: EnterModel | None, halves: bool
    ) -> None:
        super().__init__()
        self.handler, self.read_shape, self.enter_model = handler, read_shape, enter_model
        self.halves = halves
        self.scopes = [""]
        self.resting = False
        self.counts: dict[tuple[str, str], int] = defaultdict(int)

    def enter(self, scope: str) -> None:
        if len(self.scopes) == 1:  # a new pass: what ran before it, as the last token of a generation, does not count
            self.counts.clear()
        self.scopes.append(scope)

    def changed_inputs(self, args: Any, kwargs: Any) -> Any:
        """What the model is called with, through ``enter_model``, whose own torch calls are not the model's."""
        if self.enter_model is None:
            return None
        self.resting = True
        try:
            return self.enter_model(args, kwargs)
        finally:
            self.resting = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        op = None if self.resting else operation_name(func)
        if op is None:
            result = func(*args, **kwargs)
            if self.read_shape is None or getattr(func, "__self__", None) is not Tensor.shape:
                return result
            return self.read_shape(args[0], result)
        if (parts := parts_of(op, args, kwargs)) is not None:
            with self:
                return parts(*args, **kwargs)
        scope = self.scopes[-1]
        index = self.counts[scope, op]
        self.counts[scope, op] += 1
        call = in_float32(func, op) if self.halves or names_half(op, args, kwargs) else func
        result = self.handler(OpKey(scope, op, index), call, args, kwargs)
        if self.read_shape is not None and op in ("size", "numel", "nelement"):
            return self.read_shape(args[0], result, *args[1:], **kwargs)
        return result


class _Scopes:
    """Tells the interception that runs in the present thread which module of a model is entered and left.

    Hooks stay on the modules as long as any thread needs them: a dictionary of hooks must not change while another
    thread goes through it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)
        self.users = 0
        self.active = threading.local()
        self.hooks: list[Any] = []

    def add(self) -> None:
        model = self.model()
        assert model is not None, "it is being called"
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # takes no hooks, and its calls are not seen anyway
            own = weakref.ref(module)  # a copy of the model takes its hooks along, which must not count
            enter = partial(self._enter, own, name)
            self.hooks.append(module.register_forward_pre_hook(enter, prepend=not name, with_kwargs=True))
            self.hooks.append(module.register_forward_hook(partial(self._leave, own), always_call=True))

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    def _enter(self, own: weakref.ref[nn.Module], name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        calls = getattr(self.active, "calls", None)
        if calls is None or own() is not module:
            return None
        calls.enter(name)
        return None if name else calls.changed_inputs(args, kwargs)

    def _leave(self, own: weakref.ref[nn.Module], module: nn.Module, _args: Any, _output: Any) -> None:
        calls = getattr(self.active, "calls", None)
        if calls is not None and own() is module:
            calls.scopes.pop()

    def __deepcopy__(self, memo: Any) -> _Scopes:
        return self


_scopes: weakref.WeakKeyDictionary[nn.Module, _Scopes] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


@contextmanager
def intercept(
    model: nn.Module, handler: Handler, read_shape: ReadShape | None = None, enter_model: EnterModel | None = None
) -> Iterator[None]:
    """Send every torch call made inside ``model`` to ``handler(key, func, args, kwargs)``, whose result replaces the
    call's; what ``x.shape``, ``x.size()`` and ``x.numel()`` give goes through ``read_shape(x, result)``, and what the
    model is called with, by whichever of its methods, through ``enter_model(args, kwargs)``.

    Composite functions are taken apart: of attention the handler gets the products and the softmax. It runs with
    interception off, so it may compute freely. The ``func`` of a model with state in half precision computes in
    float32. Several threads may do this with one model at once. Hooks are removed with the last of them, whatever
    happens.
    """
    with calling(), _hooked(model) as scopes:
        outer = getattr(scopes.active, "calls", None)
        scopes.active.calls = calls = _Calls(handler, read_shape, enter_model, stores_halves(model))
        try:
            with calls:
                yield
        finally:
            scopes.active.calls = outer


@contextmanager
def _hooked(model: nn.Module) -> Iterator[_Scopes]:
    with _lock:
        scopes = _scopes.setdefault(model, _Scopes(model))
        scopes.users += 1
        if scopes.users == 1:
            scopes.add()
    try:
        yield scopes
    finally:
        with _lock:
            scopes.users -= 1
            if not scopes.users:
                scopes.remove()


def computing(model: nn.Module) -> AbstractContextManager[None]:
    """A block in which a model computes in float32, whatever the type of its state."""

    def plainly(key: OpKey, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    return intercept(model, plainly) if stores_halves(model) else nullcontext()


def device_of(model: nn.Module) -> torch.device:
    """Where a model is: its first parameter that holds values."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


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
    """Apply ``change`` to copies of every floating-point model input, where the model is and at least float32; keys
    are ``input``, ``input[1]``, ... in the order of the forward's parameters. Objects that are no plain containers, as
    caches are, stay themselves.
    """
    device = device_of(model)
    order = {parameter.name: i for i, parameter in enumerate(forward_parameters(model))}
    ordered = dict(sorted(kwargs.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))
    positions = iter(range(1 << 30))

    def changed(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        key = replace(INPUT, output=next(positions))
        own = _copied(leaf, device)
        return change(key, widened(own)) if own.is_floating_point() else own

    return tuple(replaced(item, changed) for item in args), replaced(ordered, changed)


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


def own_inputs(args: Any, kwargs: Any, device: torch.device | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copies of a model's inputs on its device: one that works in place must not change the caller's data."""

    def copied(leaf: Any) -> Any:
        return _copied(leaf, device or leaf.device) if isinstance(leaf, Tensor) else leaf

    return tuple(replaced(item, copied) for item in args), replaced(dict(kwargs), copied)


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.clone() if tensor.device == device else tensor.to(device)


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors of a nested value, in order."""
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]
