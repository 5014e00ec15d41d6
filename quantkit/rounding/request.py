"""What layers are to be rounded to, and by what: the options of rounding, with what an earlier run has finished."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from quantkit.formats import WeightFormat
from quantkit.program.layers import Weights
from quantkit.reconstruction.snapshot import Cache, Rounded
from quantkit.rounding.weights import WITHOUT_INPUTS, rounded_layer


class Moments(NamedTuple):
    """Of a layer's inputs X in the quantized network: the sum of X^T X, (groups, K, K) float64, and where it was asked
    for that of Y^T X, Y its inputs in the float network.
    """

    hessian: Tensor | None = None
    cross: Tensor | None = None


@dataclass(frozen=True)
class RoundingRequest:
    """The format of each layer, in execution order, and the rounding; layers in ``cache`` are not rounded again."""

    formats: Mapping[str, WeightFormat]
    rounding: str = "auto"
    progress: bool = True
    cache: Cache = field(default_factory=Cache)

    def rounded(self, floats: Weights, layer: str, moments: Callable[[], Moments]) -> Rounded:
        """A layer's codes and how it was rounded: by the ``moments`` of its inputs where the rounding asks for them
        and the layer has any.
        """
        format, rounding = self.formats[layer], self.rounding
        looks = rounding not in WITHOUT_INPUTS
        if looks and not floats.layers[layer].reads_rows:
            rounding, looks = "nearest", False

        def compute() -> Rounded:
            hessian, cross = moments() if looks else Moments()
            return rounded_layer(floats, layer, format, hessian, cross, rounding)

        return self.cache.rounding(layer, format, compute)
