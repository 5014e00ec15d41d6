"""What layers are to be rounded to, and by what: the options of rounding, with what an earlier run has finished."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from quantkit.formats import WeightFormat
from quantkit.numbers.uniform import QuantizedWeight
from quantkit.program.layers import Weights
from quantkit.reconstruction.snapshot import Cache
from quantkit.rounding import Moments, Rounding, rounding_of
from quantkit.rounding.weights import rounded_layer


@dataclass(frozen=True)
class RoundingRequest:
    """The format of each layer, in execution order, and the rounding; layers in ``cache`` are not rounded again."""

    formats: Mapping[str, WeightFormat]
    rounding: str = "auto"
    progress: bool = True
    cache: Cache = field(default_factory=Cache)

    @property
    def method(self) -> Rounding:
        return rounding_of(self.rounding)

    def looks_at_inputs(self, floats: Weights, layer: str) -> bool:
        """Whether a layer is rounded by what it reads."""
        return self.method.hessian and floats.layers[layer].reads_rows

    def finished(self, layer: str) -> tuple[QuantizedWeight, str] | None:
        """The codes of a layer and how it was rounded, where an earlier run did so."""
        return self.cache.rounded(layer, self.formats[layer])

    def rounded(self, floats: Weights, layer: str, moments: Moments | None) -> tuple[QuantizedWeight, str]:
        """Round a layer, and keep what came of it."""
        blind = self.method.hessian and not floats.layers[layer].reads_rows
        rounding = "nearest" if blind else self.rounding
        found = rounded_layer(floats, layer, self.formats[layer], moments, rounding)
        self.cache.keep_rounded(layer, *found)
        return found
