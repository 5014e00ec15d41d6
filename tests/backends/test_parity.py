"""The numbers of a comparison, and which of them pass."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantkit.backends.onnxruntime import writer
from quantkit.backends.onnxruntime.parity import (
    DEFAULT_TOLERANCE,
    OutputParity,
    Tolerance,
    beyond_by_own_noise,
    measure_parity,
    relative_error,
    require_parity,
)
from quantkit.errors import ParityError
from quantkit.simulation.model import SimulatedModel
from tests.backends.helpers import prepared, simulate
from tests.backends.models import ConvTwice
from tests.program.models import randn


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


def test_what_a_model_differs_from_itself_by_is_told_from_what_is_wrong() -> None:
    """Twice its own noise, and nothing else, is put down to that."""
    noisy, wrong = found(0.2, noise=0.12), found(0.3, noise=0.12)
    assert beyond_by_own_noise([found(0.001), noisy], DEFAULT_TOLERANCE) == [noisy]
    assert beyond_by_own_noise([noisy, wrong], DEFAULT_TOLERANCE) == []
    assert beyond_by_own_noise([found(0.2)], DEFAULT_TOLERANCE) == []
    assert beyond_by_own_noise([found(0.001)], DEFAULT_TOLERANCE) == []


@pytest.mark.parametrize("wrong", [False, True])
def test_beyond_its_own_noise_a_file_is_compared_with_activations_in_float(
    wrong: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    batch = ((randn(4, 4, 6, 6),), {})
    simulated = simulate(prepared(ConvTwice().eval(), batch), batch, 8)
    compared = []

    def measured(path: Path, model: SimulatedModel, *given: Any, **options: Any) -> tuple[OutputParity, ...]:
        compared.append(model.ranges)
        if model is simulated:
            return (found(0.2, noise=0.15),)
        return (found(0.2),) if wrong else measure_parity(path, model, *given)

    monkeypatch.setattr(writer, "measure_parity", measured)
    monkeypatch.setattr(writer, "layers_in_float", lambda *_: [])
    if wrong:
        with pytest.raises(ParityError, match=r"differs by 20\.00%"):
            writer.export_onnx(simulated, batch, tmp_path / "model.onnx")
        assert not list(tmp_path.iterdir())
        return
    with caplog.at_level(logging.INFO, "quantkit"):
        report = writer.export_onnx(simulated, batch, tmp_path / "model.onnx")
    assert compared == [simulated.ranges, {}] and simulated.ranges
    assert "the model differs from itself by 15.0%" in caplog.text
    assert report.parity[0].relative_error == 0.2
