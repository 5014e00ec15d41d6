"""Scales and zero points of integer weights, one per output channel or group, by a search for the least squared error.

Symmetric codes reach one step further down than up (-8..7). A symmetric scale therefore carries a sign: the extreme of
larger magnitude is put on the longer side. It costs nothing to store and at 2 bits (-2..1) it is worth more than a bit
of search: on ResNet20 with GPTQ, KL falls from 0.42 to 0.24 at 2 bits and from 0.08 to 0.05 at 3 bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quantkit.formats import WeightFormat
from quantkit.numbers.scales import BY_CHANNEL, SHARED, ScaleGrid, with_scales_of_others
from quantkit.ranges.minifloat_weights import minifloat_scale

SHARES = tuple(torch.linspace(1.0, 0.2, 81, device="cpu").tolist())  # tried of the range that clips nothing
LONG = 1024  # inputs of a row from which on its error is smooth enough in the share to be searched coarse to fine
COARSE = 4
PIECE = 1 << 18  # weights searched for at once: most of what is computed on the way stays in the processor's cache
PLAIN = ScaleGrid()
CLIPPED = {2: 0.93}  # bits -> the share of a range that is covered where clipping a little is better
AT_ONCE, ELEMENTS_AT_ONCE = 9, 1 << 17  # shares of small weights that are tried in one step


def shares_tried(inputs: int) -> float:
    """Of all shares, how many are tried for a row of so many inputs: one in four, then those around the best."""
    return 1.0 if inputs < LONG else 1 / COARSE + 2 * (COARSE - 1) / len(SHARES)


def _between(lowest: Tensor, highest: Tensor, format: WeightFormat, grid: ScaleGrid = PLAIN) -> tuple[Tensor, Tensor]:
    """Scale, of the ``grid``, and zero point at which codes cover [lowest, highest], which contain zero."""
    low, high = format.code_range
    if not format.zero_point:
        larger, smaller = torch.maximum(-lowest, highest), torch.minimum(-lowest, highest)
        scale = torch.maximum(larger / -low, smaller / high)
        sign = torch.where(-lowest >= highest, 1.0, -1.0).to(scale.dtype)
        scale = grid.nearest(torch.where(scale > 0, scale * sign, torch.ones_like(scale)))
        return scale, torch.zeros_like(scale)
    scale = (highest - lowest) / (high - low)
    scale = grid.nearest(torch.where(scale > 0, scale, torch.ones_like(scale)))
    return scale, (low - torch.round(lowest / scale)).clamp(low, high)


def mse_range(weight: Tensor, format: WeightFormat, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The scale and zero point (..., 1) of each row of ``weight`` (..., inputs) with the least squared rounding error,
    of the scales that the format stores.

    Searched over 81 shares of the clipping-free range between 1 and 0.2, in long rows coarse to fine; ties keep the
    wider one. ``importance`` (broadcastable to the weight) weighs the squared errors, e.g. by the mean square of the
    input a weight multiplies.
    """
    importance = None if importance is None else importance.expand_as(weight)
    lowest, highest = _ends(weight)
    grid = (
        PLAIN
        if format.scale in BY_CHANNEL
        else ScaleGrid.of(with_scales_of_others(_between(lowest, highest, format)[0], highest > lowest), format)
    )
    if weight.numel() <= PIECE or weight.dim() < 2:
        return _Search(weight, format, importance, grid).found()
    axis = max(range(weight.dim() - 1), key=lambda i: weight.shape[i])
    each = max(1, PIECE * weight.shape[axis] // weight.numel())
    pieces = weight.split(each, axis)
    weights = [None] * len(pieces) if importance is None else importance.split(each, axis)
    found = [_Search(piece, format, own, grid).found() for piece, own in zip(pieces, weights, strict=True)]
    scales, zeros = zip(*found, strict=True)
    return torch.cat(scales, axis), torch.cat(zeros, axis)


def _ends(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The range of each row, zero included."""
    return weight.amin(-1, keepdim=True).clamp(max=0), weight.amax(-1, keepdim=True).clamp(min=0)


def whole_ranges(rows: Tensor, format: WeightFormat) -> tuple[Tensor, Tensor]:
    """Scale and zero point (..., O, scales) of groups (..., O, K) for codes that correct each other: nothing is
    clipped, but at 2 bits a little (docs/methods/weight-ranges.md).
    """
    lowest, highest = _ends(rows.unflatten(-1, (-1, format.group or rows.shape[-1])))
    grid = ScaleGrid.of(_between(lowest, highest, format)[0], format)
    share = CLIPPED.get(format.bits, 1.0)
    scale, zero = _between(lowest * share, highest * share, format, grid)
    return scale.squeeze(-1), zero.squeeze(-1)


class _Search:
    """The share of its range with the least error, for each row of a weight."""

    def __init__(self, weight: Tensor, format: WeightFormat, importance: Tensor | None, grid: ScaleGrid) -> None:
        self.weight, self.format, self.importance, self.grid = weight, format, importance, grid
        self.lowest, self.highest = _ends(weight)
        self.shares = torch.tensor(SHARES, dtype=weight.dtype, device=weight.device)
        self.best = torch.zeros_like(self.lowest, dtype=torch.int64)  # of the shares
        self.least = torch.full_like(self.lowest, torch.inf)
        squares = weight.square() if importance is None else weight.square() * importance
        most = squares.argmax(-1, keepdim=True)  # of each row the weight that matters most
        self.largest = weight.gather(-1, most).abs()
        self.matters = 1 if importance is None else importance.gather(-1, most)

    def found(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each row."""
        step = 1 if self.weight.shape[-1] < LONG else COARSE
        coarse = torch.arange(0, len(SHARES), step, device=self.weight.device)
        for numbers in self._at_once(coarse.reshape(-1, *[1] * self.weight.dim())):
            if not self._tried(numbers):
                break
        if step > 1:
            around = torch.tensor([away for away in range(1 - step, step) if away], device=self.weight.device)
            fine = self.best + around.reshape(-1, *[1] * self.weight.dim())
            for numbers in self._at_once(fine.clamp_(0, len(SHARES) - 1)):
                self._tried(numbers)
        return self._at(self.best)

    def _at_once(self, numbers: Tensor) -> Iterator[Tensor]:
        """Shares in the order in which they are tried, as many at once as memory and the cache take."""
        yield from numbers.split(max(1, min(AT_ONCE, ELEMENTS_AT_ONCE // max(1, self.weight.numel()))))

    def _tried(self, numbers: Tensor) -> bool:
        """Try shares (tried, ..., 1), by number; False where clipping alone costs more than the best before one of
        them, in every row.
        """
        low, high = self.format.code_range
        scale, zero = self._at(numbers)
        # ``dequantize`` of ``quantize`` in place, without a zero point where there is none
        missed = torch.div(self.weight, scale).round_()
        if self.format.zero_point:
            missed.add_(zero).clamp_(low, high).sub_(zero)
        else:
            missed.clamp_(low, high)
        missed.mul_(scale).sub_(self.weight).square_()
        error = (missed if self.importance is None else missed.mul_(self.importance)).sum(-1, keepdim=True)

        tried = len(numbers)
        if not self.format.zero_point:
            clipped = (self.largest + low * scale.abs()).clamp(min=0).square() * self.matters
            before = torch.cat([self.least.unsqueeze(0), error[:-1]]).cummin(0).values
            # what clipping the weight that matters most costs is more than the least error, and ever more from here on
            enough = (clipped >= before).flatten(1).all(1)
            tried = int(enough.int().argmax()) if enough.any() else tried
        if tried:
            least, found = error[:tried].min(0)
            better = least < self.least
            best = numbers.expand_as(error).gather(0, found.unsqueeze(0))[0]
            self.best, self.least = torch.where(better, best, self.best), torch.where(better, least, self.least)
        return tried == len(numbers)

    def _at(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        share = self.shares[numbers]
        return _between(self.lowest * share, self.highest * share, self.format, self.grid)


def group_ranges(rows: Tensor, format: WeightFormat, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``mse_range`` of every group of inputs: scale and zero point (..., O, scales) of ``rows`` (..., O, K).
    ``importance`` is broadcastable to the rows. Of floating-point numbers ``minifloat_scale``.
    """
    groups = (-1, format.group or rows.shape[-1])
    if importance is not None:
        importance = importance.expand_as(rows).unflatten(-1, groups)
    if not format.is_integer:
        scale = minifloat_scale(rows.unflatten(-1, groups), format, importance).squeeze(-1)
        return scale, torch.zeros_like(scale)
    grouped = rows.unflatten(-1, groups)
    scale, zero = (x.squeeze(-1) for x in mse_range(grouped, format, importance))
    if format.scale in SHARED:
        scale = with_scales_of_others(scale, grouped.abs().amax(-1) > 0)
        scale = ScaleGrid.of(scale, format).nearest(scale)
    return scale, zero


def per_input(per_group: Tensor, inputs: int) -> Tensor:
    """Scales or zero points of groups (..., scales) as one per input (..., inputs)."""
    return per_group.repeat_interleave(inputs // per_group.shape[-1], dim=-1)
