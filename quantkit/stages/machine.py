"""How fast this machine does what rounding consists of, from a few tenths of a second of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from quantkit.formats import WeightFormat
from quantkit.ranges.activations import Extremes, Histogram, mse_range
from quantkit.ranges.weights import shares_tried
from quantkit.rounding import Moments, rounding_of
from quantkit.rounding.gptq import STRETCH, slice_rows
from quantkit.rounding.moments import inverse_factor
from quantkit.rounding.weights import quantize_weight

_SIZE = 640  # of the matrices it is measured on
_LONG = 0.5  # seconds
_TALL = (1024, 64)  # the shape of a weight with rows enough to fill the caches, as those of large layers do


@dataclass(frozen=True)
class Machine:
    """Seconds of the processor for one multiplication of a large product in float32; for one of those by which GPTQ
    factors a Hessian (there are K^3), and by which it spreads errors, none in roundings without; and for one column,
    whatever its length, and one weight of a layer.
    """

    product: float
    factor: float
    spread: float
    column: float
    weight: float

    def rounding(self, shape: tuple[int, int, int], width: int, formats: int) -> float:
        """Seconds to round a weight (groups, O, K) whose X^T X is known, in blocks of ``width`` inputs, to so many
        formats.
        """
        groups, rows, inputs = shape
        factors = groups * math.ceil(inputs / width) * width**3 * self.factor
        slices = math.ceil(rows / slice_rows(groups, inputs))
        weight = self.weight * shares_tried(inputs)
        each = slices * width * self.column + groups * rows * inputs * (weight + width * self.spread)
        return factors + formats * each


@cache
def machine(rounding: str) -> Machine:
    """This machine's speeds with a rounding, by name; measured once in a process."""
    x = torch.rand(_SIZE, _SIZE, generator=torch.Generator().manual_seed(0), device="cpu")
    hessian = (x.T @ x).double().unsqueeze(0)
    product = seconds_of(lambda: x @ x) / _SIZE**3
    factor = spread = 0.0
    if rounding_of(rounding).factored:
        factor = seconds_of(lambda: inverse_factor(hessian)) / _SIZE**3
        spread = len(STRETCH) / 2 * product  # an error reaches the columns behind it, half of them in the mean
    column = _rounded_seconds(x[:1], hessian, rounding) / _SIZE
    rows, inputs = _TALL
    tall = torch.rand(_TALL, generator=torch.Generator().manual_seed(0), device="cpu")
    seconds = _rounded_seconds(tall, hessian[:, :inputs, :inputs], rounding)
    weight = (seconds - inputs * column) / (rows * inputs) - inputs * spread
    return Machine(product, factor, spread, column, max(weight, 0.0))


@cache
def range_seconds() -> float:
    """Seconds to find the range of a site from its histogram; measured once in a process."""
    x = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0), device="cpu").relu()
    histogram = Histogram.empty(Extremes().seen(x)).seen(x)
    return seconds_of(lambda: mse_range(histogram, 8))


def _rounded_seconds(rows: Tensor, hessian: Tensor, rounding: str) -> float:
    moments = Moments(hessian)
    if rounding_of(rounding).fisher:
        moments = Moments(hessian, output=torch.eye(len(rows), dtype=torch.float64, device="cpu").unsqueeze(0))
    assert moments.factor is not None, "a random matrix can be factored"
    return seconds_of(lambda: quantize_weight(rows, [WeightFormat("4")], moments, rounding=rounding))


def seconds_of(work: Callable[[], object]) -> float:
    """Seconds of the processor for some work: the lesser of two, since the first run of anything also prepares it,
    which is nothing beside a long one.
    """
    found = math.inf
    for _ in range(2):
        started = time.process_time()
        work()
        found = min(found, time.process_time() - started)
        if found > _LONG:
            break
    return found
