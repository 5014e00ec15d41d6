"""Adaptive pooling of images whose size varies: ONNX has pools with written-out windows only, and the exporter would
write those of the example.

Windows are gathered along one axis after the other, by indices that the graph computes from the size: window i of n
goes from floor(i * size / n) to ceil((i + 1) * size / n).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Reduce = Callable[[Tensor, Tensor], Tensor]  # (windows (..., n, places), which places are inside) -> (..., n)


def _mean(windows: Tensor, inside: Tensor) -> Tensor:
    return (windows * inside).sum(-1) / inside.sum(-1)


def _largest(windows: Tensor, inside: Tensor) -> Tensor:
    return windows.amax(-1)  # places behind the end of a window repeat its last


# Function -> the axes that it pools, and how. Those that return indices too are left to the exporter.
_POOLS: dict[Any, tuple[int, Reduce]] = {
    F.adaptive_avg_pool1d: (1, _mean),
    F.adaptive_avg_pool2d: (2, _mean),
    F.adaptive_avg_pool3d: (3, _mean),
    F.adaptive_max_pool1d: (1, _largest),
    F.adaptive_max_pool2d: (2, _largest),
    F.adaptive_max_pool3d: (3, _largest),
}


class AdaptivePools(TorchFunctionMode):
    """Takes adaptive pools apart along axes whose size varies while a model is exported."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return _apart(func, *args, **kwargs) if func in _POOLS else func(*args, **kwargs)


def _apart(func: Callable[..., Any], input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    axes, reduce = _POOLS[func]
    wanted = output_size if isinstance(output_size, tuple | list) else (output_size,) * axes
    varies = any(isinstance(size, SymInt) for size in input.shape[-axes:])
    if not varies or all(count == 1 for count in wanted):  # one window is the whole image, whatever its size
        return func(input, output_size)
    for axis, count in zip(range(-axes, 0), wanted, strict=True):
        input = input if count is None else _pooled(input, axis, count, reduce)
    return input


def _pooled(x: Tensor, axis: int, count: int, reduce: Reduce) -> Tensor:
    """``x`` with ``count`` windows along an axis."""
    size = x.shape[axis]
    window = torch.arange(count, device=x.device)[:, None]
    start, stop = window * size // count, ((window + 1) * size + count - 1) // count
    places = start + torch.arange((size + count - 1) // count + 1, device=x.device)
    inside = (places < stop).to(x.dtype)
    return reduce(x.movedim(axis, -1)[..., torch.minimum(places, stop - 1)], inside).movedim(-1, axis)
