"""The numbers of a comparison, and which of them pass."""

from __future__ import annotations

import math

import numpy as np
import pytest

from quantkit.backends.onnxruntime.parity import (
    DEFAULT_TOLERANCE,
    OutputParity,
    Tolerance,
    relative_error,
    require_parity,
)
from quantkit.errors import ParityError


def found(error: float, optimized: bool = False, noise: float = 0.0, output: str = "logits") -> OutputParity:
    return OutputParity(output, optimized, error, error, noise, 1.0)


def test_relative_error_is_scale_free() -> None:
    wanted = np.array([[3.0, -4.0]])
    assert relative_error(1.1 * wanted, wanted) == pytest.approx(0.1)
    assert relative_error(110 * wanted, 100 * wanted) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("one", "other", "error"),
    [
        (np.zeros(3), np.zeros(3), 0.0),
        (np.ones(3), np.zeros(3), math.inf),
        (np.array([np.nan, 1]), np.ones(2), math.inf),
        (np.array([True, False]), np.array([True, False]), 0.0),
    ],
)
def test_what_cannot_be_related_fails_unless_equal(one: np.ndarray, other: np.ndarray, error: float) -> None:
    assert relative_error(one, other) == error


def test_exact_tolerance_grows_with_the_models_own_noise() -> None:
    require_parity([found(0.02, noise=0.01)], DEFAULT_TOLERANCE)
    with pytest.raises(ParityError, match=r"without optimization differs by 2\.00%.*tolerance is 0\.50%"):
        require_parity([found(0.02)], DEFAULT_TOLERANCE)


def test_the_worst_output_is_named() -> None:
    parts = [found(0.0), found(0.2, optimized=True, output="boxes"), found(0.11, optimized=True)]
    with pytest.raises(ParityError, match=r"output 'boxes' in onnxruntime with integer kernels differs by 20\.00%"):
        require_parity(parts, DEFAULT_TOLERANCE)
    require_parity(parts, Tolerance(optimized=0.25))
