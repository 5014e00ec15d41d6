"""The arguments of torch's convolutions: their order, and what their options come to on each axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CONVOLUTIONS = tuple(f"conv{t}{d}d" for t in ("", "_transpose") for d in (1, 2, 3))
CONV_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
# transposed ones take ``groups`` before ``dilation``
TRANSPOSED_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


def named_arguments(op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of ``op``, a convolution, by their names."""
    names = TRANSPOSED_ARGUMENTS if op.startswith("conv_transpose") else CONV_ARGUMENTS
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def per_axis(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """A convolution's option for each of its axes."""
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)


def padded_sides(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    """(before, after) on each axis; torch's "same" puts the odd one after."""
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [(t // 2, t - t // 2) for t in total]
    return [(p, p) for p in per_axis(0 if padding == "valid" else padding, len(kernel))]
