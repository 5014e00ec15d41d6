"""Single damages and pair terms against a slow twin, and against the exact second order of the divergence."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from quantkit.numbers.uniform import QuantizedWeight
from quantkit.sensitivity.damage import KLDamage
from quantkit.sensitivity.gram import gram
from quantkit.sensitivity.measure import Perturbation, Scores, Subject
from quantkit.sensitivity.pair_terms import (
    RELIABLE,
    TEMPERATURES,
    Shifts,
    gram_matrix,
    pair_terms,
    split_half_reliability,
)
from tests.sensitivity.networks import (
    by_hand,
    classifier,
    inputs,
    outputs_of,
    perturbed,
    request_of,
    samples_of,
    subject_of,
)


@pytest.fixture(scope="module")
def measured() -> tuple[Scores, list[Perturbation], Subject, Tensor, list[Tensor]]:
    """Scores, what was perturbed, the subject, the float outputs and the perturbed outputs computed by hand."""
    batches = inputs()
    request = request_of(classifier(), batches)
    changes = perturbed(request)
    x = torch.cat([args[0] for args, _ in batches])
    outputs = [by_hand(request, x, [one]) for one in changes]
    subject = subject_of(request, batches)
    return gram(subject, changes, progress=False), changes, subject, by_hand(request, x, []), outputs


def slow_gram(reference: Tensor, outputs: list[Tensor], temperature: float) -> np.ndarray:
    """Row by row, with the explicit matrix diag(p) - p p^T between the shifts."""
    z, shifts = reference.double().numpy(), [(o - reference).double().numpy() for o in outputs]
    total = np.zeros((len(outputs), len(outputs)))
    for n in range(len(z)):
        p = np.exp(z[n] / temperature - (z[n] / temperature).max())
        p /= p.sum()
        middle = np.diag(p) - np.outer(p, p)
        total += np.array([[a[n] @ middle @ b[n] for b in shifts] for a in shifts])
    return total


def test_single_damages_are_the_mean_divergence_with_its_standard_error(measured) -> None:
    scores, _, _, reference, outputs = measured
    rows = torch.stack([KLDamage().rows(reference, o) for o in outputs]).double().numpy()
    assert np.allclose(scores.damage, rows.mean(1), rtol=1e-3, atol=1e-7)
    expected = rows.std(1, ddof=1) / rows.shape[1] ** 0.5
    assert np.allclose(scores.standard_error, expected, rtol=1e-3, atol=1e-7)


def test_pair_terms_are_the_shrunk_cosines_of_a_slow_twin_times_the_damages(measured) -> None:
    scores, _, _, reference, outputs = measured
    slow = slow_gram(reference, outputs, scores.notes["temperature"])
    lengths = np.sqrt(np.diag(slow))
    damages = np.sqrt(2 * scores.damage)
    cosines = scores.notes["reliability"] * slow / np.outer(lengths, lengths)
    expected = np.zeros_like(slow)
    for strength, fading in scores.notes["pair_terms"]:
        reach = 1 / np.sqrt(1 + fading * scores.damage)
        expected += strength * cosines * np.outer(damages * reach, damages * reach)
    np.fill_diagonal(expected, 2 * scores.damage)
    assert np.allclose(scores.gram, expected, rtol=2e-3, atol=1e-6)


def test_matrix_is_positive_semidefinite_and_its_diagonal_twice_the_damage(measured) -> None:
    scores = measured[0]
    assert np.allclose(np.diag(scores.gram), 2 * scores.damage)
    assert np.linalg.eigvalsh(scores.gram).min() >= -1e-9 * scores.damage.max()


def test_prediction_tends_to_the_damage_of_all_together_as_perturbations_shrink() -> None:
    """With small perturbations of one network, half the sum of the matrix is the divergence, without shrinking."""
    batches = inputs(400)
    request = request_of(classifier(), batches)
    subject = subject_of(request, batches)
    eighths = [p for p in perturbed(request) if p.format == "w8" and isinstance(p.change, QuantizedWeight)]
    # weights a little too large in every layer: shifts that add up
    grown = [replace(p, change=replace(p.change, scale=p.change.scale * 1.02)) for p in eighths]
    reference = torch.cat(outputs_of(subject))
    shifts = torch.stack([torch.cat(outputs_of(subject, [p])) - reference for p in grown])
    matrix = gram_matrix(KLDamage(), reference.double(), shifts.double(), 1.0, torch.arange(400)) / 400
    together = KLDamage().rows(reference.double(), torch.cat(outputs_of(subject, grown)).double()).mean()
    assert 0.5 * matrix.sum() == pytest.approx(float(together), rel=0.05)
    assert 0.5 * np.trace(matrix) < 0.6 * float(together)


def test_memory_slices_do_not_change_the_matrix(monkeypatch: pytest.MonkeyPatch, measured) -> None:
    _, _, _, reference, outputs = measured
    shifts = torch.stack([o - reference for o in outputs])
    rows = torch.tensor([*range(16), *range(20, 40, 2)])
    whole = gram_matrix(KLDamage(), reference, shifts, 2.0, rows)
    monkeypatch.setattr("quantkit.sensitivity.pair_terms.SLICE_BYTES", 8 * shifts.shape[0] * shifts.shape[2] * 3)
    assert np.allclose(gram_matrix(KLDamage(), reference, shifts, 2.0, rows), whole, rtol=1e-9)


def test_split_half_reliability_recovers_the_share_of_signal() -> None:
    draw = np.random.default_rng(0)
    signal, noise = draw.normal(size=20_000), draw.normal(size=(2, 20_000))
    halves = [signal + one for one in noise]
    # the mean of both halves has variance 1 of signal and 1/2 of noise
    assert split_half_reliability(*halves) == pytest.approx(2 / 3, abs=0.02)
    assert split_half_reliability(noise[0], noise[1]) == pytest.approx(0, abs=0.03)
    assert split_half_reliability(signal, signal) == pytest.approx(1)
    assert split_half_reliability(signal, -signal) == 0
    assert split_half_reliability(np.zeros(0), np.zeros(0)) == 1


def synthetic(rows: int, sharpness: float, common: float) -> tuple[Tensor, Tensor]:
    """Outputs of a given confidence, and shifts of six entries that share a part."""
    draw = torch.Generator().manual_seed(0)
    reference = sharpness * torch.randn(rows, 10, generator=draw)
    shared = torch.randn(10, generator=draw)
    return reference, torch.randn(6, rows, 10, generator=draw) + common * shared


def shifts_of(reference: Tensor, shifts: Tensor, samples: Tensor | None = None) -> Shifts:
    return Shifts(KLDamage(), reference, shifts, torch.arange(len(reference)) if samples is None else samples)


def test_metric_is_softened_only_as_far_as_the_inputs_make_it_necessary() -> None:
    owners = list("abcdef")
    plenty = pair_terms([shifts_of(*synthetic(20_000, 1, 1))], owners)
    assert (plenty.temperature, plenty.reliability > RELIABLE) == (1, True)
    overconfident = pair_terms([shifts_of(*synthetic(300, 12, 1))], owners)
    assert overconfident.temperature > 1
    nothing_shared = pair_terms([shifts_of(*synthetic(60, 3, 0))], owners)
    assert nothing_shared.temperature == TEMPERATURES[-1]
    assert nothing_shared.reliability < 0.5


def test_rows_of_a_sample_are_told_from_the_batches() -> None:
    assert samples_of([6, 3], [2, 1]).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert samples_of([2, 2], [2, 2]).tolist() == [0, 1, 2, 3]
    assert samples_of([3, 5], [2, 2]).tolist() == [0, 0, 1, 2, 2, 2, 3, 3]  # as near as it can be told
    assert samples_of([4], [1]).tolist() == [0, 0, 1, 1]


def test_batches_do_not_matter_to_pair_terms() -> None:
    reference, shifts = synthetic(300, 3, 0.3)
    together, apart = (
        pair_terms([shifts_of(reference, shifts, samples_of(split, split))], list("abcdef"))
        for split in ([300], [7, 93, 200])
    )
    assert together.reliability == apart.reliability
    assert (together.cosines == apart.cosines).all()


def test_formats_of_one_layer_are_no_evidence_of_reliability() -> None:
    reference, shifts = synthetic(60, 3, 0)
    twins = torch.cat([shifts, shifts])
    names = list("abcdef") * 2
    assert pair_terms([shifts_of(reference, twins)], names).reliability < 0.5
    alone = pair_terms([shifts_of(reference, shifts)], ["a"] * 6)
    assert (alone.temperature, alone.reliability) == (1, 1)


def test_format_that_changes_nothing_has_no_damage_and_no_pair_terms() -> None:
    batches = inputs()
    request = request_of(classifier(), batches)
    changes = perturbed(request)
    first = changes[0]
    weight = request.ready.model.get_submodule(first.owner).weight
    harmless = replace(first.change, codes=torch.zeros_like(first.change.codes))
    weight.data = harmless.dequantize().to(weight)
    scores = gram(subject_of(request, batches), [replace(first, change=harmless), *changes[1:]], progress=False)
    assert scores.damage[0] == 0
    assert not scores.gram[0].any()
    assert np.isfinite(scores.gram).all()
