"""Estimators by name: a dict and a decorator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch

from quantkit.errors import InvalidRequest
from quantkit.sensitivity.measure import Perturbation, Scores, Subject


class Estimator(Protocol):
    """Scores perturbations of a subject; ``generator`` is the only source of randomness."""

    def __call__(
        self, subject: Subject, perturbations: Sequence[Perturbation], progress: bool, generator: torch.Generator
    ) -> Scores: ...


ESTIMATORS: dict[str, Estimator] = {}
RANKINGS: set[str] = set()
E = TypeVar("E", bound=Callable[..., Scores])


def estimator(name: str, ranking: bool = False) -> Callable[[E], E]:
    """Register a function under ``name``; ``ranking``: it only orders layers (``Scores.ranking``)."""

    def register(function: E) -> E:
        ESTIMATORS[name] = function
        if ranking:
            RANKINGS.add(name)
        return function

    return register


def require_additive(name: str) -> None:
    """Raise InvalidRequest where an estimator only ranks layers: a plan's damage is a sum, and ranks have no unit."""
    if name in RANKINGS:
        known = ", ".join(n for n in ESTIMATORS if n not in RANKINGS)
        raise InvalidRequest(
            f"sensitivity={name!r} ranks layers and gives no damages that could be added up to that of a plan. "
            f"Choose one of {known}; or take the order of its ranking for the solver 'by-rank'."
        )
