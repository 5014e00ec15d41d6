"""Stochastic Lanczos against the eigenvalues of explicit matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantkit.sensitivity.spectrum import Spectrum, lanczos, spectral_density
from tests.sensitivity.explicit import WEIGHTS, Explicit
from tests.sensitivity.networks import classifier, generator, inputs, request_of, subject_of


@pytest.fixture(scope="module")
def case() -> tuple[object, np.ndarray]:
    batches = inputs(24)
    request = request_of(classifier(), batches)
    exact = Explicit(request, batches)
    size = sum(exact.weights[w].numel() for w in WEIGHTS)
    return subject_of(request, batches), np.linalg.eigvalsh(exact.hessian[:size, :size])


def test_outliers_are_eigenvalues_of_the_explicit_hessian_each_found_once(case) -> None:
    subject, exact = case
    found = spectral_density(subject, WEIGHTS, generator(), steps=60, progress=False)
    assert found.dimension == len(exact)
    assert np.allclose(found.values[-5:], exact[-5:], rtol=1e-3)
    assert found.weights.sum() == pytest.approx(1)


def test_density_is_that_of_the_explicit_eigenvalues(case) -> None:
    """Cumulated from the top: the share of eigenvalues above a point, on average over starts."""
    subject, exact = case
    found = spectral_density(subject, WEIGHTS, generator(), steps=40, starts=12, progress=False)
    for point in (0.05, 0.2, 0.5):
        share = found.weights[found.values > point].sum()
        assert share == pytest.approx((exact > point).mean(), abs=0.035), point


def test_trace_is_within_three_standard_errors_of_the_explicit_one(case) -> None:
    subject, exact = case
    draws = [spectral_density(subject, WEIGHTS, generator(s), 12, progress=False).trace for s in range(12)]
    assert abs(np.mean(draws) - exact.sum()) <= 3 * np.std(draws, ddof=1) / 12**0.5
    assert np.array_equal(draws[0], spectral_density(subject, WEIGHTS, generator(0), 12, progress=False).trace)


def test_all_steps_give_all_eigenvalues_without_ghosts() -> None:
    """Widely spread values, where Lanczos without reorthogonalization returns copies of the largest."""
    draw = np.random.default_rng(0)
    exact = np.sort(np.concatenate([draw.uniform(0, 1, 57), [40, 300, 2500]]))
    basis, _ = np.linalg.qr(draw.normal(size=(60, 60)))
    matrix = torch.tensor(basis @ np.diag(exact) @ basis.T)
    values, weights = lanczos(lambda v: matrix @ v, torch.tensor(draw.normal(size=60)), steps=60)
    assert np.allclose(values, exact, rtol=1e-6, atol=1e-6)
    assert weights.sum() == pytest.approx(1)


def test_iteration_ends_where_the_matrix_has_no_more_eigenvalues() -> None:
    matrix = torch.diag(torch.tensor([0.0] * 8 + [1.0, 5.0], dtype=torch.float64))
    values, weights = lanczos(lambda v: matrix @ v, torch.ones(10, dtype=torch.float64), steps=10)
    assert np.allclose(values, [0, 1, 5], atol=1e-9)
    assert np.allclose(weights, [0.8, 0.1, 0.1])
    nothing, _ = lanczos(torch.zeros_like, torch.ones(4, dtype=torch.float64), steps=4)
    assert nothing.tolist() == [0]


def test_density_integrates_to_one_and_peaks_at_the_values() -> None:
    spectrum = Spectrum(np.array([0.0, 2.0]), np.array([0.75, 0.25]), 100)
    points = np.linspace(-1, 3, 8001)
    density = spectrum.density(points, width=0.05)
    assert density.sum() * (points[1] - points[0]) == pytest.approx(1, rel=1e-6)
    assert points[density.argmax()] == pytest.approx(0, abs=1e-3)
    assert density[points > 1].sum() / density.sum() == pytest.approx(0.25)
    assert spectrum.trace == pytest.approx(50)
    # PyHessian's width: a standard deviation of sqrt(1e-5 * range)
    assert spectrum.density(np.zeros(1))[0] == pytest.approx(0.75 / np.sqrt(2 * np.pi * 2e-5))
