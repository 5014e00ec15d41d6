"""Power iteration against the eigenvalues of the explicit Hessian, per layer and per sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantkit.sensitivity.curvature import Landscape
from quantkit.sensitivity.hessian_eigenvalue import hessian_eigenvalue, top_eigenvalues
from quantkit.sensitivity.measure import Perturbation, Subject
from tests.sensitivity.explicit import WEIGHTS, Explicit
from tests.sensitivity.networks import classifier, generator, inputs, perturbed, request_of, subject_of


@pytest.fixture(scope="module")
def case() -> tuple[Subject, list[Perturbation], Explicit]:
    batches = inputs(24)
    request = request_of(classifier(), batches)
    return subject_of(request, batches), perturbed(request), Explicit(request, batches)


@pytest.mark.parametrize("seed", range(3))
def test_eigenvalue_of_a_layer_is_the_largest_of_its_block(case, seed: int) -> None:
    subject, changes, exact = case
    land = Landscape(subject, changes)
    with land.opened():
        found = top_eigenvalues(land, generator(seed), progress=False)
    assert {name for name, _ in found} == set(WEIGHTS)
    for place, value in found.items():
        assert value == pytest.approx(np.linalg.eigvalsh(exact.block(place))[-1], rel=1e-3), place


def test_damage_is_half_the_eigenvalue_times_the_squared_error_per_sample_for_sites(case) -> None:
    subject, changes, exact = case
    scores = hessian_eigenvalue(subject, changes, False, generator())
    moved = exact.displacements(changes)
    count = len(exact.x)
    for k, p in enumerate(changes):
        parts = moved[k][exact.slots[p.place]].reshape(count if p.place[1] else 1, -1)
        block = exact.block(p.place)
        width = parts.shape[1]
        tops = [np.linalg.eigvalsh(block[i : i + width, i : i + width])[-1] for i in range(0, len(block), width)]
        assert scores.damage[k] == pytest.approx(0.5 * np.dot(tops, (parts**2).sum(1)), rel=3e-3), p


def test_damage_bounds_the_exact_second_order(case) -> None:
    subject, changes, exact = case
    scores = hessian_eigenvalue(subject, changes, False, generator())
    moved = exact.displacements(changes)
    second = 0.5 * np.einsum("ki,ij,kj->k", moved, exact.hessian, moved)
    assert (scores.damage >= 0.997 * second).all()


def test_orders_are_by_mean_eigenvalue_and_by_damage_at_the_narrowest_format(case) -> None:
    subject, changes, exact = case
    notes = hessian_eigenvalue(subject, changes, False, generator()).notes
    top = {w: np.linalg.eigvalsh(exact.block((w, False)))[-1] for w in WEIGHTS}
    error = {p.owner: m @ m for p, m in zip(changes, exact.displacements(changes), strict=True) if p.format == "w2"}
    assert notes["bit_order"] == sorted(top, key=lambda w: -top[w] / exact.weights[w].numel())
    assert notes["reconstruction_order"] == sorted(top, key=lambda w: -top[w] * error[w])


def test_layer_that_changes_nothing_has_the_eigenvalue_zero() -> None:
    batches = inputs(12)
    model = classifier()
    with torch.no_grad():
        model[4].weight.zero_()
    request = request_of(model, batches)
    scores = hessian_eigenvalue(subject_of(request, batches), perturbed(request), False, generator())
    assert scores.notes["eigenvalues"]["0"] == 0 and scores.notes["eigenvalues"]["4"] > 0
    assert np.isfinite(scores.damage).all()
