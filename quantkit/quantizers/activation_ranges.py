"""Ranges of activations, streamed: minimum and maximum, and the clipping with the least squared error.

Two passes over the calibration data, each of fixed size and exactly mergeable: first the extremes, then a histogram
between them. The same data gives the same range however it is split into batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.kernels.reference import SiteRange, dequantize, quantize

BINS = 2048


@dataclass(frozen=True)
class Extremes:
    """The least and the greatest value seen; starts empty."""

    low: float = float("inf")
    high: float = float("-inf")

    def seen(self, x: Tensor) -> Extremes:
        return self if x.numel() == 0 else self.merged(Extremes(*(float(v) for v in torch.aminmax(x))))

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
        return cls(extremes, torch.zeros(BINS, dtype=torch.int64))

    def seen(self, x: Tensor) -> Histogram:
        low, high = self.extremes.low, self.extremes.high
        width = (high - low) / BINS
        if width <= 0 or x.numel() == 0:
            return self
        bins = ((x.reshape(-1) - low) / width).long().clamp_(0, BINS - 1)
        return Histogram(self.extremes, self.counts + torch.bincount(bins, minlength=BINS))

    def merged(self, other: Histogram) -> Histogram:
        return Histogram(self.extremes, self.counts + other.counts)

    def centres(self) -> Tensor:
        width = (self.extremes.high - self.extremes.low) / BINS
        return self.extremes.low + width * (torch.arange(BINS, dtype=torch.float64) + 0.5)


def range_between(low: float, high: float, bits: int) -> SiteRange:
    """Unsigned codes covering [low, high] with zero representable; the zero point is rounded and clamped.

    A range below the smallest normal float gets scale 1: the tensor is constant zero.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    steps = (1 << bits) - 1
    scale = float(torch.tensor((high - low) / steps, dtype=torch.float32))
    if scale < torch.finfo(torch.float32).tiny:
        return SiteRange(1.0, 0, bits)
    return SiteRange(scale, max(0, min(steps, round(-low / scale))), bits)


def minmax_range(histogram: Histogram, bits: int) -> SiteRange:
    """The range that clips nothing."""
    return range_between(histogram.extremes.low, histogram.extremes.high, bits)


def mse_range(histogram: Histogram, bits: int) -> SiteRange:
    """The range with the least squared quantization error over the histogram.

    Upper and lower bound are each shrunk towards zero over a grid, in turns until neither improves.
    """
    values, counts = histogram.centres(), histogram.counts.double()

    def error(found: SiteRange) -> float:
        scale, zero = torch.tensor(found.scale).double(), torch.tensor(float(found.zero_point)).double()
        rounded = dequantize(quantize(values, scale, zero, 0, found.high), scale, zero)
        return float((counts * (rounded - values).square()).sum())

    edges = histogram.extremes.with_zero()
    grid = torch.linspace(1.0, 0.02, 99).tolist()
    low = high = 1.0
    best = error(range_between(edges.low, edges.high, bits))
    improved = bool(counts.sum() > 0)
    while improved:
        improved = False
        for side in ("high", "low"):
            for shrink in grid:
                trial = (low, shrink) if side == "high" else (shrink, high)
                found = error(range_between(edges.low * trial[0], edges.high * trial[1], bits))
                if found < best * (1 - 1e-9):
                    best, (low, high), improved = found, trial, True
    return range_between(edges.low * low, edges.high * high, bits)


RANGES = {"minmax": minmax_range, "mse": mse_range}
