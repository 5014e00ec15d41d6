"""A float model with the formats that a plan gives its layers and sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantkit.formats import ActivationFormat, WeightFormat
from quantkit.program.inputs import Batch
from quantkit.transforms.prepare import Prepared


@dataclass(frozen=True)
class Formatted:
    """A float model with the formats of its layers and sites, and the data."""

    ready: Prepared
    weights: Mapping[str, WeightFormat]
    sites: Mapping[str, ActivationFormat]
    batches: Sequence[Batch]
