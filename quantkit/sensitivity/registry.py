"""Estimators by name: a dict and a decorator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from quantkit.errors import InvalidRequest
from quantkit.sensitivity.measure import Perturbation, Scores, Subject


class Estimator(Protocol):
    """Scores perturbations of a subject; ``generator`` is the only source of randomness."""

    def __call__(
        self, subject: Subject, perturbations: Sequence[Perturbation], progress: bool, generator: torch.Generator
    ) -> Scores: ...


@dataclass(frozen=True)
class Workload:
    """How much there is to estimate: formats of layers and sites together, these layers and sites, and samples."""

    formats: int
    places: int
    samples: int


@dataclass(frozen=True)
class Cost:
    """What an estimator takes: ``forwards`` of the sample set, roughly (a backward counts as two); whether it keeps
    the output shifts of all formats, or the graph of a batch.
    """

    forwards: Callable[[Workload], float]
    keeps_shifts: bool = False
    keeps_graph: bool = False


ESTIMATORS: dict[str, Estimator] = {}
COSTS: dict[str, Cost] = {}
RANKINGS: set[str] = set()
NO_INPUTS: set[str] = set()
E = TypeVar("E", bound=Callable[..., Scores])


def estimator(name: str, cost: Cost, ranking: bool = False, inputs: bool = True) -> Callable[[E], E]:
    """Register a function under ``name``; ``ranking``: it only orders layers (``Scores.ranking``). ``inputs``:
    it runs the model on the subject's inputs.
    """

    def register(function: E) -> E:
        ESTIMATORS[name] = function
        COSTS[name] = cost
        if ranking:
            RANKINGS.add(name)
        if not inputs:
            NO_INPUTS.add(name)
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
