"""What layers are to be rounded to, and by what: the options of rounding, with what an earlier run has finished."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from quantkit.formats import WeightFormat
from quantkit.numbers.uniform import QuantizedWeight
from quantkit.program.layers import Weights
from quantkit.reconstruction.snapshot import Cache
from quantkit.rounding.weights import WITHOUT_INPUTS, rounded_layer


@dataclass(frozen=True)
class RoundingRequest:
    """The format of each layer, in execution order, and the rounding; layers in ``cache`` are not rounded again."""

    formats: Mapping[str, WeightFormat]
    rounding: str = "auto"
    progress: bool = True
    cache: Cache = field(default_factory=Cache)

    def looks_at_inputs(self, floats: Weights, layer: str) -> bool:
        """Whether a layer is rounded by what it reads."""
        return self.rounding not in WITHOUT_INPUTS and floats.layers[layer].reads_rows

    def finished(self, layer: str) -> tuple[QuantizedWeight, str] | None:
        """The codes of a layer and how it was rounded, where an earlier run did so."""
        return self.cache.rounded(layer, self.formats[layer])

    def rounded(
        self, floats: Weights, layer: str, hessian: Tensor | None, cross: Tensor | None = None
    ) -> tuple[QuantizedWeight, str]:
        """Round a layer, and keep what came of it."""
        rounding = self.rounding
        if not floats.layers[layer].reads_rows and rounding not in WITHOUT_INPUTS:
            rounding = "nearest"
        found = rounded_layer(floats, layer, self.formats[layer], hessian, cross, rounding)
        self.cache.keep_rounded(layer, *found)
        return found
