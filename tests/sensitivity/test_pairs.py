"""Pair terms by Hessian-vector products, by forward differences, and the augmented score made of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantkit.errors import InvalidRequest
from quantkit.sensitivity import pairwise as module
from quantkit.sensitivity.augmented import augmented_scores
from quantkit.sensitivity.damage import KLDamage
from quantkit.sensitivity.hvp_pairs import hvp_pairs
from quantkit.sensitivity.measure import Perturbation, Scores, Subject
from quantkit.sensitivity.pairwise import pairwise, projected
from tests.sensitivity.explicit import Explicit
from tests.sensitivity.networks import by_hand, classifier, inputs, perturbed, request_of, subject_of


@pytest.fixture(scope="module")
def case() -> tuple[Subject, list[Perturbation], Explicit, np.ndarray]:
    """Subject, perturbations, explicit derivatives, and measured damage of every single and pair, (K, K)."""
    batches = inputs(24)
    request = request_of(classifier(), batches)
    changes = perturbed(request)
    x = torch.cat([args[0] for args, _ in batches])
    reference = by_hand(request, x, [])

    def damage(*chosen: Perturbation) -> float:
        return float(KLDamage().rows(reference, by_hand(request, x, list(chosen))).double().mean())

    measured = np.array([[damage(a) if a is b else damage(a, b) for b in changes] for a in changes])
    return subject_of(request, batches), changes, Explicit(request, batches), measured


def test_pair_terms_are_those_of_the_explicit_hessian(case) -> None:
    subject, changes, exact, _ = case
    moved = exact.displacements(changes)
    expected = moved @ exact.hessian @ moved.T
    scores = hvp_pairs(subject, changes, False, torch.Generator())
    lengths = np.sqrt(np.diag(expected))
    assert np.abs((scores.gram - expected) / np.outer(lengths, lengths)).max() < 1e-3
    assert np.allclose(scores.damage, 0.5 * np.diag(expected), rtol=1e-3)
    assert np.allclose(np.diag(scores.gram), 2 * scores.damage)


def test_pair_terms_do_not_depend_on_how_samples_are_batched(case) -> None:
    subject, changes, _, _ = case
    whole = hvp_pairs(subject, changes, False, torch.Generator())
    x = torch.cat([args[0] for args, _ in subject.batches])
    parts = Subject(subject.model, [((p,), {}) for p in x.split(5)], subject.sites)
    assert np.allclose(hvp_pairs(parts, changes, False, torch.Generator()).gram, whole.gram, rtol=1e-3, atol=1e-7)


def test_single_damages_converge_with_more_data() -> None:
    request = request_of(classifier(), inputs(64))
    one = perturbed(request)[3:4]

    def damage(count: int, seed: int) -> float:
        return float(hvp_pairs(subject_of(request, inputs(count, seed)), one, False, torch.Generator()).damage[0])

    few, many = ([damage(count, seed) for seed in range(10)] for count in (32, 512))
    assert np.std(many) < 0.5 * np.std(few)  # a quarter, but for the luck of ten draws


def test_forward_differences_are_the_measured_ones_projected_and_scaled_to_the_damages(case) -> None:
    subject, changes, _, measured = case
    single = np.diag(measured)
    apart = np.array([[a.place != b.place for b in changes] for a in changes])
    raw = np.where(apart, measured - single[:, None] - single, 0) + np.diag(2 * single)
    values, vectors = np.linalg.eigh(raw)
    near = sum(v * np.outer(u, u) for v, u in zip(values, vectors.T, strict=True) if v > 0)
    scale = np.diag(np.sqrt(2 * single / np.diag(near)))
    scores = pairwise(subject, changes, False, torch.Generator())
    assert np.allclose(scores.damage, single, rtol=1e-3, atol=1e-7)
    assert np.allclose(scores.gram, scale @ near @ scale, rtol=2e-3, atol=1e-5)
    assert np.linalg.eigvalsh(scores.gram).min() > -1e-9
    assert scores.notes["projected_away"] == pytest.approx(-values[values < 0].sum() / np.abs(values).sum(), abs=1e-3)


def test_differences_equal_the_exact_pair_terms_where_damage_is_quadratic(case) -> None:
    """Between weights in 8 bits nothing is left but second order: the two estimators see the same."""
    subject, changes, exact, _ = case
    eight = [p for p in changes if p.format == "w8"]
    moved = exact.displacements(eight) @ np.linalg.cholesky(exact.hessian + 1e-12 * np.eye(len(exact.hessian)))
    cosines = (moved @ moved.T) / np.outer(np.linalg.norm(moved, axis=1), np.linalg.norm(moved, axis=1))
    found = hvp_pairs(subject, eight, False, torch.Generator()).gram
    lengths = np.sqrt(np.diag(found))
    assert np.allclose(found / np.outer(lengths, lengths), cosines, atol=2e-3)


def test_projection_keeps_a_positive_semidefinite_matrix_and_its_diagonal() -> None:
    root = np.random.default_rng(0).normal(size=(6, 4))
    matrix = root @ root.T
    kept, share = projected(matrix, np.diag(matrix))
    assert np.allclose(kept, matrix) and share == pytest.approx(0, abs=1e-12)
    indefinite = matrix - 2 * np.eye(6)
    np.fill_diagonal(indefinite, np.diag(matrix))
    indefinite[0, 1] = indefinite[1, 0] = 10
    repaired, share = projected(indefinite, np.diag(matrix))
    assert share > 0.05 and np.linalg.eigvalsh(repaired).min() > -1e-9
    assert np.allclose(np.diag(repaired), np.diag(matrix))


def test_too_many_forwards_are_refused_before_any_is_run(case, monkeypatch) -> None:
    subject, changes, _, _ = case
    monkeypatch.setattr(module, "MOST_FORWARDS", 50)
    monkeypatch.setattr(subject.model, "forward", None)
    with pytest.raises(InvalidRequest, match=r"needs 70 forwards .* for 12 formats.*at most 50.*choose 'gram'"):
        pairwise(subject, changes, False, torch.Generator())


def test_augmented_score_adds_what_a_layer_does_to_all_others_at_their_narrowest(case) -> None:
    _, changes, _, _ = case
    draw = np.random.default_rng(0).normal(size=(len(changes), 5))
    gram = draw @ draw.T
    scores = Scores(np.diag(gram) / 2, np.zeros(len(changes)), gram)
    narrow = {p.owner: k for k, p in enumerate(changes) if p.format == "w2"}
    found = augmented_scores(changes, scores)
    assert list(found) == list(narrow)
    for name, k in narrow.items():
        others = [max(0.0, gram[k, m]) for other, m in narrow.items() if other != name]
        assert found[name] == pytest.approx(gram[k, k] / 2 + sum(others))
    alone = augmented_scores(changes, Scores(scores.damage, scores.standard_error))
    assert alone == {name: scores.damage[k] for name, k in narrow.items()}
