"""A float model with the formats that a plan gives its layers and sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantkit.formats import ActivationFormat, WeightFormat
from quantkit.program.inputs import Batch
from quantkit.program.program import Program
from quantkit.rounding.request import RoundingOptions
from quantkit.transforms.prepare import Prepared


@dataclass(frozen=True)
class Formatted:
    """A float model with the formats of its layers and sites, the data, and the ``program`` that stands for the model
    on all of it; None where there is none.
    """

    ready: Prepared
    weights: Mapping[str, WeightFormat]
    sites: Mapping[str, ActivationFormat]
    batches: Sequence[Batch]
    program: Program | None = None

    def rounding(self, layer: str, options: RoundingOptions) -> RoundingOptions:
        """The options of rounding for one layer, whose codes may have 8 bits."""
        return options.for_codes(self.ready.weights.layers[layer], self.weights[layer].bits)
