"""Which reads of linear layers get a ratio for each channel, and which: searched by the error behind the layers.

The ratio of a channel is its largest magnitude to a power between 0 and 1, after SmoothQuant (Xiao et al., arXiv
2211.10438, equation 4, without the weight's own share). One range is found for the tensor divided by it; ranges are
tried too that clip nothing, as one token of a network may have to keep its value whatever the squared error of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.formats import ActivationFormat, WeightFormat
from quantkit.numbers.per_token import TokenRange
from quantkit.numbers.ratios import Ratio, divided, exponents, factors
from quantkit.numbers.uniform import SiteRange
from quantkit.program.layers import Weights
from quantkit.ranges.activations import RANGES, Extremes, Histogram, minmax_range
from quantkit.ranges.channels import HELD_BACK
from quantkit.rounding.weights import quantize_weight
from quantkit.transforms.reads import Read

POWERS = (0.25, 0.5, 0.65, 0.8, 1.0)
WORTH = 0.7  # of the error without a ratio: more is not worth a multiplication
CHANNELS = 128  # of a layer's outputs that errors are summed over
SMALLEST = 1e-4  # of the largest channel
COUNTED = 2048  # rows that a squared error is summed over


@dataclass(frozen=True)
class ScaledRead:
    """What came of the search: the range of a read, with or without a ratio, and the errors without it and with it."""

    read: Read
    found: SiteRange | TokenRange
    before: float
    after: float

    @property
    def ratios(self) -> dict[str, Ratio]:
        """Layer -> its ratio."""
        return dict.fromkeys(self.read.layers, self.found.ratio) if self.found.ratio else {}

    @property
    def ranges(self) -> dict[str, SiteRange | TokenRange]:
        return dict.fromkeys(self.read.sites, self.found)

    @property
    def helps(self) -> bool:
        return self.after < WORTH * self.before

    def __str__(self) -> str:
        if not self.before:
            return "exact"
        how = "channels scaled as it is read" if self.found.ratio else "a range that clips nothing"
        kept = how if self.helps else "as it is"
        return f"error behind it {self.after / self.before:.2f} of that with one range: {kept}"


@torch.no_grad()
def searched(
    read: Read,
    rows: Tensor,
    floats: Weights,
    weights: Mapping[str, WeightFormat],
    asked: ActivationFormat,
    ranges: str,
) -> ScaledRead:
    """The best range of a read on ``rows`` (N, channels) of it: found on some, compared on others that were held
    back. A ratio is taken where the error falls to ``WORTH`` of the least without one.
    """
    held, training = rows[::HELD_BACK], rows[torch.arange(len(rows), device="cpu") % HELD_BACK != 0]
    if not len(training):
        training = held
    matrices = [(_some_channels(floats[name].detach().cpu().float()), weights[name]) for name in read.layers]
    error = _errors(held, matrices)
    plain, *others = [(found, error(found)) for found in _ranges_of(training, asked, ranges, ())]
    least = min([plain, *(other for other in others if other[1] < WORTH * plain[1])], key=lambda pair: pair[1])
    scaled = [found for ratio in _ratios(training) for found in _ranges_of(training, asked, ranges, ratio)]
    best = min([least, *((found, error(found)) for found in scaled)], key=lambda pair: pair[1])
    found, after = best if best[1] < WORTH * least[1] else least
    return ScaledRead(read, found, plain[1], after)


def _some_channels(weight: Tensor) -> Tensor:
    return weight[:: -(-len(weight) // CHANNELS)]


def _ratios(rows: Tensor) -> Iterator[Ratio]:
    largest = rows.abs().amax(0)
    if float(largest.max()) > 0:
        for power in POWERS:
            yield exponents(largest.clamp(min=SMALLEST * float(largest.max())) ** power)


def _ranges_of(rows: Tensor, asked: ActivationFormat, ranges: str, ratio: Ratio) -> Iterator[SiteRange | TokenRange]:
    """The ranges to try with a ratio: of the method asked for first."""
    if asked.dynamic:
        yield TokenRange(asked.bits, ratio)
        return
    rows = divided(rows, ratio)
    histogram = Histogram.empty(Extremes().seen(rows)).seen(rows[:: -(-len(rows) // COUNTED)])
    for method in dict.fromkeys((RANGES[ranges], minmax_range)):
        yield replace(method(histogram, asked.bits), ratio=ratio)


def _errors(
    rows: Tensor, matrices: Sequence[tuple[Tensor, WeightFormat]]
) -> Callable[[SiteRange | TokenRange], float]:
    """The squared error of the products of ``rows`` with matrices, by a range of the rows; weights to nearest."""
    wanted = [rows @ weight.T for weight, _ in matrices]
    rounded: dict[Ratio, list[Tensor]] = {}

    def error(found: SiteRange | TokenRange) -> float:
        if found.ratio not in rounded:
            rounded[found.ratio] = [_nearest(weight, format, found.ratio) for weight, format in matrices]
        read = found.fake_quantize(rows)
        products = zip(rounded[found.ratio], wanted, strict=True)
        return sum(float((read @ weight.T - exact).square().sum(dtype=torch.float64)) for weight, exact in products)

    return error


def _nearest(weight: Tensor, format: WeightFormat, ratio: Ratio) -> Tensor:
    columns = factors(ratio) if ratio else torch.ones(weight.shape[1], dtype=torch.float32, device="cpu")
    return quantize_weight(weight * columns, [format], rounding="nearest").weights[format].dequantize() / columns
