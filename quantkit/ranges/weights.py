"""Scales and zero points of integer weights, one per output channel or group, by a search for the least squared error.

Symmetric codes reach one step further down than up (-8..7). A symmetric scale therefore carries a sign: the extreme of
larger magnitude is put on the longer side. It costs nothing to store and at 2 bits (-2..1) it is worth more than a bit
of search: on ResNet20 with GPTQ, KL falls from 0.42 to 0.24 at 2 bits and from 0.08 to 0.05 at 3 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.formats import WeightFormat
from quantkit.numbers.uniform import quantize

SHARES = tuple(torch.linspace(1.0, 0.2, 81, device="cpu").tolist())  # tried of the range that clips nothing
AT_ONCE, ELEMENTS_AT_ONCE = 9, 1 << 17


def _between(lowest: Tensor, highest: Tensor, format: WeightFormat) -> tuple[Tensor, Tensor]:
    """Scale and zero point at which codes cover [lowest, highest], which contain zero."""
    low, high = format.code_range
    if not format.zero_point:
        larger, smaller = torch.maximum(-lowest, highest), torch.minimum(-lowest, highest)
        scale = torch.maximum(larger / -low, smaller / high)
        sign = torch.where(-lowest >= highest, 1.0, -1.0).to(scale.dtype)
        return torch.where(scale > 0, scale * sign, torch.ones_like(scale)), torch.zeros_like(scale)
    scale = (highest - lowest) / (high - low)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, (low - torch.round(lowest / scale)).clamp(low, high)


def mse_range(weight: Tensor, format: WeightFormat, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The scale and zero point (..., 1) of each row of ``weight`` (..., inputs) with the least squared rounding error.

    Searched over 81 shares of the clipping-free range between 1 and 0.2; ties keep the wider one. ``importance``
    (broadcastable to the weight) weighs the squared errors, e.g. by the mean square of the input a weight multiplies.
    """
    low, high = format.code_range
    lowest, highest = weight.amin(-1, keepdim=True).clamp(max=0), weight.amax(-1, keepdim=True).clamp(min=0)
    squares = weight.square() if importance is None else weight.square() * importance
    most = squares.argmax(-1, keepdim=True)  # of each row the weight that matters most
    largest = weight.gather(-1, most).abs()
    matters = 1 if importance is None else importance.expand_as(weight).gather(-1, most)
    best, least = torch.ones_like(lowest), torch.full_like(lowest, torch.inf)
    for shares in _shares_in_turn(weight):
        scale, zero = _between(lowest * shares, highest * shares, format)
        missed = quantize(weight, scale, zero, low, high).sub_(zero).mul_(scale).sub_(weight)
        error = (missed.square_() if importance is None else missed.square_().mul_(importance)).sum(-1, keepdim=True)
        tried = len(shares)
        if not format.zero_point:
            clipped = (largest + low * scale.abs()).clamp(min=0).square() * matters
            before = torch.cat([least.unsqueeze(0), error[:-1]]).cummin(0).values
            # what clipping the weight that matters most costs is more than the least error, and ever more from here on
            enough = (clipped >= before).flatten(1).all(1)
            tried = int(enough.int().argmax()) if enough.any() else tried
        if tried:
            found = error[:tried].argmin(0, keepdim=True)
            of_found = error.gather(0, found)[0]
            better = of_found < least
            best = torch.where(better, shares.expand_as(error).gather(0, found)[0], best)
            least = torch.where(better, of_found, least)
        if tried < len(shares):
            break
    return _between(lowest * best, highest * best, format)


def _shares_in_turn(weight: Tensor) -> tuple[Tensor, ...]:
    """The shares (tried, 1, ..., 1) in the order in which they are tried, as many at once as memory and the cache
    take.
    """
    shares = torch.tensor(SHARES, dtype=weight.dtype, device=weight.device)
    at_once = max(1, min(AT_ONCE, ELEMENTS_AT_ONCE // max(1, weight.numel())))
    return shares.reshape(-1, *[1] * weight.dim()).split(at_once)


def group_ranges(rows: Tensor, format: WeightFormat, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``mse_range`` of every group of inputs: scale and zero point (..., O, scales) of ``rows`` (..., O, K).
    ``importance`` is broadcastable to the rows.
    """
    groups = (-1, format.group or rows.shape[-1])
    if importance is not None:
        importance = importance.expand_as(rows).unflatten(-1, groups)
    scale, zero = mse_range(rows.unflatten(-1, groups), format, importance)
    return scale.squeeze(-1), zero.squeeze(-1)


def per_input(per_group: Tensor, inputs: int) -> Tensor:
    """Scales or zero points of groups (..., scales) as one per input (..., inputs)."""
    return per_group.repeat_interleave(inputs // per_group.shape[-1], dim=-1)
