"""Ranges of activations, streamed: minimum and maximum, and the clipping with the least squared error.

Two passes over the calibration data, each of fixed size and exactly mergeable: first the extremes, then a histogram
between them. The same data gives the same range however it is split into batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quantkit.numbers.uniform import SiteRange, quantize

BINS = 2048
TINY = float(np.finfo(np.float32).tiny)
# A layer that reads nothing but zeros gives its bias, rounded to steps of this scale times its weights': fine enough
# for weights of two bits, and so wide that a bias of 2^18 steps of the weights fits into 32 bits with room for sums.
OF_ZEROS = 2.0**-12
TAIL = 1e-4  # share of the values a percentile range leaves out on either side


@dataclass(frozen=True)
class Extremes:
    """The least and the greatest value seen; starts empty."""

    low: float = float("inf")
    high: float = float("-inf")

    def seen(self, x: Tensor) -> Extremes:
        return self if x.numel() == 0 else self.merged(Extremes(*(float(v) for v in torch.aminmax(x.detach()))))

    def merged(self, other: Extremes) -> Extremes:
        return Extremes(min(self.low, other.low), max(self.high, other.high))

    def with_zero(self) -> Extremes:
        """Zero must be exactly representable: padding and ReLU make it."""
        return self.merged(Extremes(0.0, 0.0))


@dataclass(frozen=True)
class Histogram:
    """Counts (int64) of values in ``BINS`` equal bins over fixed extremes."""

    extremes: Extremes
    counts: Tensor

    @classmethod
    def empty(cls, extremes: Extremes) -> Histogram:
        return cls(extremes, torch.zeros(BINS, dtype=torch.int64, device="cpu"))

    def seen(self, x: Tensor) -> Histogram:
        low, high = self.extremes.low, self.extremes.high
        width = (high - low) / BINS
        if width <= 0 or x.numel() == 0:
            return self
        bins = ((x.reshape(-1) - low) / width).long().clamp_(0, BINS - 1)
        return Histogram(self.extremes, self.counts + torch.bincount(bins, minlength=BINS).cpu())

    def merged(self, other: Histogram) -> Histogram:
        return Histogram(self.extremes, self.counts + other.counts)

    def centres(self) -> Tensor:
        width = (self.extremes.high - self.extremes.low) / BINS
        return self.extremes.low + width * (torch.arange(BINS, dtype=torch.float64, device="cpu") + 0.5)


def range_between(low: float, high: float, bits: int) -> SiteRange:
    """Unsigned codes covering [low, high] with zero representable; the zero point is rounded and clamped.

    A range below the smallest normal float is that of a tensor that is constant zero, as behind dead ReLUs; it gets
    the scale ``OF_ZEROS``.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    steps = (1 << bits) - 1
    scale = float(np.float32((high - low) / steps))
    if scale < TINY:
        return SiteRange(OF_ZEROS, 0, bits)
    return SiteRange(scale, max(0, min(steps, round(-low / scale))), bits)


def minmax_range(histogram: Histogram, bits: int) -> SiteRange:
    """The range that clips nothing."""
    return range_between(histogram.extremes.low, histogram.extremes.high, bits)


def mse_range(histogram: Histogram, bits: int) -> SiteRange:
    """The range with the least squared quantization error over the histogram.

    Upper and lower bound are each shrunk towards zero over a grid, in turns until neither improves.
    """
    edges = histogram.extremes.with_zero()
    grid = torch.linspace(1.0, 0.02, 99, dtype=torch.float32, device="cpu").tolist()
    shares = (1.0, 1.0)
    best = _squared_errors(histogram, [range_between(edges.low, edges.high, bits)])[0]
    searched = set()
    improved = bool(histogram.counts.sum() > 0)
    while improved:
        improved = False
        for side in ("high", "low"):
            low, high = shares
            if (known := (side, low if side == "high" else high)) in searched:
                continue
            searched.add(known)
            trials = [(low, shrink) if side == "high" else (shrink, high) for shrink in grid]
            ranges = [range_between(edges.low * low, edges.high * high, bits) for low, high in trials]
            for trial, found in zip(trials, _squared_errors(histogram, ranges), strict=True):
                if found < best * (1 - 1e-9):
                    best, shares, improved = found, trial, True
    return range_between(edges.low * shares[0], edges.high * shares[1], bits)


def _squared_errors(histogram: Histogram, ranges: list[SiteRange]) -> list[float]:
    """What each of the ranges, all of as many bits, makes of the values of the histogram."""
    values, counts = histogram.centres(), histogram.counts.double()
    grid = torch.tensor([(r.scale, r.zero_point) for r in ranges], dtype=torch.float64, device="cpu").unsqueeze(-1)
    scales, zeros = grid.unbind(1)
    rounded = quantize(values, scales, zeros, 0, ranges[0].high).sub_(zeros).mul_(scales)
    return rounded.sub_(values).square_().mul_(counts).sum(-1).tolist()


def percentile_range(histogram: Histogram, bits: int) -> SiteRange:
    """The range that leaves out the outermost ``TAIL`` of the values on either side, whole bins at a time."""
    counts = histogram.counts.double()
    total = float(counts.sum())
    if total == 0:
        return minmax_range(histogram, bits)
    edges = torch.linspace(
        histogram.extremes.low, histogram.extremes.high, BINS + 1, dtype=torch.float64, device="cpu"
    )
    below = counts.cumsum(0)
    first = int((below > TAIL * total).nonzero()[0])
    last = int((below >= (1 - TAIL) * total).nonzero()[0])
    return range_between(float(edges[first]), float(edges[last + 1]), bits)


def entropy_range(histogram: Histogram, bits: int) -> SiteRange:
    """The range whose codes keep most information: the least KL divergence between the values, clipped, and what is
    left of them after rounding (Migacz, "8-bit inference with TensorRT", 2017). Both bounds are shrunk alike.
    """
    edges, best, lowest = histogram.extremes.with_zero(), minmax_range(histogram, bits), float("inf")
    if histogram.counts.sum() == 0:
        return best
    for shrink in torch.linspace(1.0, 0.1, 91, dtype=torch.float32, device="cpu").tolist():
        trial = range_between(edges.low * shrink, edges.high * shrink, bits)
        if (found := _lost_information(histogram, trial)) < lowest * (1 - 1e-9):
            best, lowest = trial, found
    return best


def _lost_information(histogram: Histogram, trial: SiteRange) -> float:
    """KL(P || Q): P the counts with what is clipped moved to the outermost bins inside, Q the same counts with the
    bins of one code levelled, without what was clipped.
    """
    values, counts = histogram.centres(), histogram.counts.double()
    codes = torch.round(values / trial.scale) + trial.zero_point
    inside = (codes >= 0) & (codes <= trial.high)
    if not inside.any():
        return float("inf")
    kept, codes = counts[inside].clone(), codes[inside].long()
    filled = (kept > 0).double()
    each = torch.zeros(trial.high + 1, dtype=torch.float64, device="cpu")
    level = each.index_add(0, codes, kept) / each.index_add(0, codes, filled).clamp(min=1)
    q = level[codes] * filled
    first, last = inside.nonzero()[[0, -1], 0].tolist()
    kept[0] += counts[:first].sum()
    kept[-1] += counts[last + 1 :].sum()
    if q.sum() == 0:
        return float("inf")
    p, q = kept / kept.sum(), q / q.sum()
    least = float(p[p > 0].min()) * 1e-3  # a bin that only holds what was clipped has no room in Q
    return float((p[p > 0] * (p[p > 0] / q[p > 0].clamp(min=least)).log()).sum())


RANGES = {"minmax": minmax_range, "mse": mse_range, "percentile": percentile_range, "entropy": entropy_range}
