"""Logarithmic ranges of probabilities, found from the histograms that other ranges come from."""

from __future__ import annotations

import torch

from quantkit.numbers.logarithmic import LogRange
from quantkit.numbers.uniform import SiteRange
from quantkit.ranges.activations import Histogram

SCALES = torch.linspace(1.0, 0.3, 71, dtype=torch.float32, device="cpu")  # of the largest probability


def log_range(histogram: Histogram, bits: int) -> LogRange:
    """The logarithmic range with the least squared error over a histogram of probabilities."""
    highest = max(histogram.extremes.high, torch.finfo(torch.float32).tiny)
    trials = [
        LogRange(float(torch.tensor(highest * share, dtype=torch.float32, device="cpu")), bits)
        for share in SCALES.tolist()
    ]
    return min(trials, key=lambda trial: squared_error(histogram, trial))


def squared_error(histogram: Histogram, found: SiteRange | LogRange) -> float:
    """Sum of the squared errors that a range makes on the values of a histogram."""
    values = histogram.centres()
    error = found.fake_quantize(values) - values
    return float((histogram.counts.double() * error.square()).sum())
