"""Hutchinson's traces against those of the explicit Hessian, their errors, and what becomes of them."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from quantkit.sensitivity import hessian_trace as module
from quantkit.sensitivity.curvature import Landscape
from quantkit.sensitivity.hessian_trace import Trace, hessian_trace, hutchinson, squared_errors
from quantkit.sensitivity.measure import Perturbation, Place, Scores, Subject
from tests.sensitivity.explicit import Explicit
from tests.sensitivity.networks import classifier, generator, inputs, perturbed, request_of, subject_of


@pytest.fixture(scope="module")
def case() -> tuple[Subject, list[Perturbation], Explicit]:
    batches = inputs(24)
    request = request_of(classifier(), batches)
    return subject_of(request, batches), perturbed(request), Explicit(request, batches)


def traces_of(subject: Subject, changes: list[Perturbation], seed: int = 0, most: int = 100) -> dict[Place, Trace]:
    land = Landscape(subject, changes)
    with land.opened():
        return hutchinson(land, generator(seed), progress=False, most=most)


def test_traces_are_within_three_standard_errors_of_the_explicit_ones(case) -> None:
    subject, changes, exact = case
    for place, trace in traces_of(subject, changes).items():
        assert abs(trace.mean - np.trace(exact.block(place))) <= 3 * trace.standard_error, place
        assert trace.relative_error < 0.1, place


def test_damage_is_half_the_mean_trace_times_the_squared_error(case) -> None:
    subject, changes, exact = case
    scores = hessian_trace(subject, changes, False, generator())
    moved = exact.displacements(changes)
    for k, p in enumerate(changes):
        block = exact.block(p.place)
        expected = 0.5 * np.trace(block) / len(block) * moved[k] @ moved[k]
        assert abs(scores.damage[k] - expected) <= 3 * scores.standard_error[k] + 1e-4 * expected, p


def test_squared_errors_count_every_element_once(case) -> None:
    subject, changes, exact = case
    land = Landscape(subject, changes)
    with land.opened():
        errors, elements = squared_errors(land)
    assert np.allclose(errors, (exact.displacements(changes) ** 2).sum(1), rtol=1e-3)
    assert elements.tolist() == [len(exact.block(p.place)) for p in changes]


def test_more_probes_converge_and_their_spread_is_the_stated_error(case, monkeypatch) -> None:
    subject, changes, exact = case
    monkeypatch.setattr(module, "PRECISE", 0.0)
    monkeypatch.setattr(module, "IMPRECISE", 1.0)
    place = ("2", False)
    few = [traces_of(subject, changes[3:6], seed, most=8)[place] for seed in range(30)]
    many = [traces_of(subject, changes[3:6], seed, most=32)[place] for seed in range(30)]
    spread, wide = np.std([t.mean for t in many]), np.std([t.mean for t in few])
    assert spread < 0.7 * wide  # half, but for the luck of 30 draws
    stated = np.mean([t.standard_error for t in many])
    assert 0.6 * spread < stated < 1.6 * spread
    average = np.mean([t.mean for t in many])
    assert abs(average - np.trace(exact.block(place))) < 3 * spread / 30**0.5


def test_probing_stops_as_soon_as_every_trace_is_precise(case, monkeypatch) -> None:
    subject, changes, _ = case
    monkeypatch.setattr(module, "IMPRECISE", 1.0)
    monkeypatch.setattr(module, "PRECISE", 1.0)
    assert {t.probes for t in traces_of(subject, changes).values()} == {module.LEAST_PROBES}
    monkeypatch.setattr(module, "PRECISE", 0.0)
    assert {t.probes for t in traces_of(subject, changes, most=20).values()} == {20}


def test_layers_that_joint_probes_leave_vague_get_probes_of_their_own(case, monkeypatch) -> None:
    subject, changes, exact = case
    layers = changes[:9]
    monkeypatch.setattr(module, "PRECISE", 0.0)
    monkeypatch.setattr(module, "IMPRECISE", 1.0)
    joint = traces_of(subject, layers, most=40)
    monkeypatch.setattr(module, "IMPRECISE", 0.0)
    own = traces_of(subject, layers, most=40)
    assert not any(t.alone for t in joint.values()) and any(t.alone for t in own.values())
    for place, trace in own.items():
        assert trace.probes == (80 if trace.alone else 40)
        assert abs(trace.mean - np.trace(exact.block(place))) <= 3 * trace.standard_error, place
        assert trace.standard_error <= joint[place].standard_error, place


def test_own_probes_end_at_the_error_that_made_them_necessary(case, monkeypatch) -> None:
    subject, changes, _ = case
    monkeypatch.setattr(module, "PRECISE", 0.0)
    monkeypatch.setattr(module, "IMPRECISE", 0.101)
    traces = traces_of(subject, changes[:9], most=60)
    alone = [t for t in traces.values() if t.alone]
    assert alone and all(t.relative_error <= 0.101 for t in traces.values())
    assert max(t.probes for t in alone) < 120 and not all(t.alone for t in traces.values())


def test_negative_trace_counts_as_zero_and_is_reported(case, monkeypatch, caplog) -> None:
    subject, changes, _ = case
    found = {p.place: Trace(1.0, 0.1, 16) for p in changes} | {("2", False): Trace(-0.5, 0.1, 16)}
    monkeypatch.setattr(module, "hutchinson", lambda *_: found)
    with caplog.at_level(logging.WARNING, logger="quantkit"):
        scores = hessian_trace(subject, changes, False, generator())
    assert all(scores.damage[k] == 0 for k, p in enumerate(changes) if p.place == ("2", False))
    assert all(scores.damage[k] > 0 for k, p in enumerate(changes) if p.place != ("2", False))
    assert scores.notes["negative_traces"] == ["2"]
    assert "negative Hessian traces, counted as 0: 2" in caplog.text


def test_same_seed_gives_the_same_traces_and_another_seed_others(case) -> None:
    subject, changes, _ = case

    def run(seed: int) -> Scores:
        return hessian_trace(subject, changes[:2], False, generator(seed))

    assert np.array_equal(run(0).damage, run(0).damage)
    assert not np.array_equal(run(0).damage, run(1).damage)
