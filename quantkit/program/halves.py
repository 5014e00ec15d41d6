"""Computing in float32 with tensors that are stored in half precision.

A model keeps its matrices in the type that the user stores them in. A call that computes with one widens it for itself
alone, so that what is between calls is float32 and the result is that of the float32 model with the same weights,
while at most one layer's weight is held twice. Calls that only show a part of a stored tensor, as views do, leave it
as it is stored: whoever computes with the part widens that. A type in half precision that the model's code names
counts as float32 too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from quantkit.program.arguments import leaves_of, replaced

HALVES = (torch.float16, torch.bfloat16)

# Calls whose result may share the memory of what they read.
VIEWS = frozenset(
    "view view_as reshape reshape_as getitem select narrow expand expand_as t T mT transpose permute squeeze "
    "unsqueeze chunk split unbind flatten unflatten movedim swapaxes contiguous detach diagonal "
    "unfold as_strided".split()
)
_PICKS = VIEWS | {"embedding", "index_select"}  # their values are those that they read
_NARROWING = ("half", "bfloat16")
LINEAR_ELEMENTS = 1 << 23  # of a weight that are widened at once


def is_half(value: Any) -> bool:
    """Whether a value is a tensor in half precision."""
    return isinstance(value, Tensor) and value.dtype in HALVES


def widened(value: Any) -> Any:
    """A tensor in half precision as float32, and float32 for the name of such a type; everything else as it is."""
    if isinstance(value, torch.dtype):
        return torch.float32 if value in HALVES else value
    return value.float() if is_half(value) else value


def in_single(value: Any) -> Any:
    """A floating-point tensor as float32, as calibration inputs are whatever their type; everything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def names_half(op: str, args: Any, kwargs: Any) -> bool:
    """Whether a call asks for half precision by name, as ``x.bfloat16()`` and ``x.to(torch.float16)`` do."""
    return op in _NARROWING or any(isinstance(x, torch.dtype) and x in HALVES for x in (*args, *kwargs.values()))


def double_parameters(model: nn.Module) -> list[str]:
    """The names of parameters in float64."""
    return [name for name, parameter in model.named_parameters() if parameter.dtype == torch.float64]


def stores_halves(model: nn.Module) -> bool:
    """Whether some parameter or buffer is in half precision."""
    return any(map(is_half, chain(model.parameters(), model.buffers())))


def keep_only_matrices_half(model: nn.Module) -> None:
    """Make all floating-point state float32, in place, but what takes memory: tensors in half precision of two or more
    dimensions. Modules whose calls are not seen, or that compare types in their code, are float32 as a whole.
    """
    for module in list(model.modules()):
        if isinstance(module, nn.RNNBase | torch.jit.ScriptModule):
            module.float()
    model._apply(lambda x: x.float() if x.is_floating_point() and not (is_half(x) and x.dim() > 1) else x)


def may_write(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call may change a tensor that it is given, by its name."""
    name = getattr(func, "__name__", "")
    dunder = name.startswith("__")
    return (
        "out" in kwargs or (name.endswith("_") and not dunder) or name.startswith(("__i", "__setitem__", "_foreach"))
    )


def in_float32(func: Callable[..., Any], op: str) -> Callable[..., Any]:
    """The torch call ``func``, whose plain name is ``op``, computing in float32 whatever the type of what it reads."""

    @wraps(func)
    def call(*args: Any, **kwargs: Any) -> Any:
        if op in _PICKS:
            return _stored_or_widened(func(*args, **kwargs), args, kwargs)
        if may_write(func, kwargs):
            return func(*_like_the_first(args), **kwargs)
        if op in _NARROWING:
            return args[0].float()
        if op == "linear" and not kwargs and is_half(args[1]) and args[1].numel() > LINEAR_ELEMENTS:
            return _linear_in_slices(*args)
        args, kwargs = replaced((args, kwargs), widened)
        return func(*args, **kwargs)

    return call


def _linear_in_slices(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear call that widens some rows of its weight at a time: the head over a vocabulary is the largest layer."""
    count = max(1, LINEAR_ELEMENTS // weight.shape[1])
    x, rows = widened(x), weight.split(count)
    biases = [None] * len(rows) if bias is None else bias.split(count)
    parts = [F.linear(x, r.float(), b if b is None else b.float()) for r, b in zip(rows, biases, strict=True)]
    return torch.cat(parts, -1)


def _stored_or_widened(result: Any, args: Any, kwargs: Any) -> Any:
    """What a call picked: as it is stored where it is in the memory of what was read, else float32."""
    memory = {_memory(x) for x in leaves_of((args, kwargs)) if is_half(x)}
    if not memory:
        return result
    return tree_map(lambda x: x.float() if is_half(x) and _memory(x) not in memory else x, result)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _like_the_first(args: Any) -> Any:
    """The arguments of a call that writes to its first one, in the type of that, where types are mixed."""
    first, *others = args
    floating = isinstance(first, Tensor) and first.is_floating_point()
    if not floating or not any(map(is_half, leaves_of(args))):
        return args

    def alike(x: Any) -> Any:
        return x.to(first.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    return (first, *replaced(tuple(others), alike))
