"""Rounding weights: a name, and a function of (rows, format, moments of the layer's inputs) giving codes."""

from __future__ import annotations

from quantkit.rounding import gptaq, gptq, hqq, learned, nearest, yaqa  # noqa: F401  # registered by name
from quantkit.rounding.moments import Moments
from quantkit.rounding.registry import (
    AUTO,
    ROUNDINGS,
    WITHOUT_INPUTS,
    names_without_inputs,
    require_numbers,
    rounding_of,
)

__all__ = ["AUTO", "ROUNDINGS", "WITHOUT_INPUTS", "Moments", "names_without_inputs", "require_numbers", "rounding_of"]
