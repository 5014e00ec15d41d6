"""What layers are to be rounded to, and by what: the options of rounding, with what an earlier run has finished."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from quantkit.formats import WeightFormat
from quantkit.numbers.ratios import Ratio, factors, multiplied
from quantkit.program.layers import LayerWeight, Weights
from quantkit.reconstruction.snapshot import Cache, Rounded
from quantkit.rounding import AUTO, Moments, rounding_of
from quantkit.rounding.blocks import HESSIAN_BYTES, hessian_limit
from quantkit.rounding.registry import Rounding
from quantkit.rounding.weights import quantize_weight, rounding_note


@dataclass(frozen=True)
class RoundingOptions:
    """A rounding by name, the most bytes that X^T X of a layer's inputs may take, and moments that are ``known``."""

    name: str = AUTO
    hessian_bytes: int = HESSIAN_BYTES
    known: Mapping[str, Moments] = field(default_factory=dict)

    def for_codes(self, weight: LayerWeight, bits: int) -> RoundingOptions:
        """The same for a layer whose codes have so many bits."""
        return replace(self, hessian_bytes=hessian_limit(weight, bits, self.hessian_bytes))


@dataclass(frozen=True)
class RoundingRequest:
    """The format of each layer, in execution order, and the rounding; layers in ``cache`` are not rounded again. X^T X
    of a layer's inputs takes at most ``hessian_bytes``. ``ratios``: by what inputs of layers are divided as they are
    read. ``known``: moments that were found before.
    """

    formats: Mapping[str, WeightFormat]
    rounding: str = "auto"
    progress: bool = True
    cache: Cache = field(default_factory=Cache)
    hessian_bytes: int = HESSIAN_BYTES
    ratios: Mapping[str, Ratio] = field(default_factory=dict)
    known: Mapping[str, Moments] = field(default_factory=dict)

    @property
    def method(self) -> Rounding:
        return rounding_of(self.rounding)

    def most(self, layer: str, weight: LayerWeight) -> int:
        """The most bytes that X^T X of a layer's inputs may take."""
        return hessian_limit(weight, self.formats[layer].bits, self.hessian_bytes)

    def rounded(self, floats: Weights, layer: str, moments: Callable[[], Moments | None]) -> Rounded:
        """A layer's codes and how it was rounded: by the ``moments`` of its inputs where the rounding asks for them
        and the layer has any.
        """
        format, rounding, looks = self.formats[layer], self.rounding, self.method.hessian
        looks, known = looks and not format.is_half, self.known.get(layer)
        if looks and known is None and not floats.layers[layer].inputs_seen:
            rounding, looks = "nearest", False

        def compute() -> Rounded:
            seen, groups = (known or moments()) if looks else None, floats.layers[layer].groups
            weight, ratio = floats[layer], self.ratios.get(layer, ())
            if ratio:
                weight, seen = multiplied(weight, ratio), None if seen is None else seen.divided(factors(ratio))
            found = quantize_weight(weight, [format], seen, groups, rounding)
            return found.weights[format], rounding_note(layer, found, rounding)

        return self.cache.rounding(layer, format, compute)
