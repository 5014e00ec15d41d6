"""A change of a model's parameters that leaves what it computes as it is."""

from __future__ import annotations

from typing import Any, Protocol

from quantkit.program.layers import Weights


class Change(Protocol):
    """One piece of a transform, with the numbers it takes; a frozen record."""

    def apply(self, weights: Weights) -> None:
        """Change the model that these are the weights of, in place."""
        ...

    def record(self) -> dict[str, Any]:
        """How a plan says it, as JSON takes it: ``transform`` is the transform's name, ``at`` where in the model; with
        the rest the transform finds the same change again from the same model and data.
        """
        ...
