"""The errors quantkit raises on purpose: each message says what was asked, what was found and what to try."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches


class QuantkitError(Exception):
    """Base of every error quantkit raises on purpose. ``exit_code`` is what the command line returns for it."""

    exit_code = 1


class InvalidRequest(QuantkitError, ValueError):
    """The request cannot be carried out as given: a bad argument, recipe key, model, batch or plan."""


class CorruptFile(QuantkitError):
    """A plan, profile, recipe or weights file is truncated, damaged or from another version."""


class InfeasibleBudget(QuantkitError):
    """No plan meets a limit. ``limit`` names it with its value, ``smallest`` is the least that can be reached."""

    exit_code = 2

    def __init__(self, message: str, limit: str = "", smallest: float = float("nan")) -> None:
        super().__init__(message)
        self.limit = limit
        self.smallest = smallest


class AccuracyNotMet(QuantkitError):
    """No plan meets the accuracy limit. ``best`` is the result that loses least, quantized and ready to be exported,
    ``curve`` the (size, metric) points measured.
    """

    exit_code = 3

    def __init__(self, message: str, best: object = None, curve: Sequence[tuple[float, float]] = ()) -> None:
        super().__init__(message)
        self.best = best
        self.curve = tuple(curve)


class ParityError(QuantkitError):
    """The exported file does not compute what the simulated model computes."""

    exit_code = 3


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """A sentence with the nearest known names (empty when there are none), to end an error message with."""
    near = get_close_matches(name, list(known), n=3, cutoff=0.4)
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
