"""What holds for every estimator, whatever it computes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from quantkit.recipe.inventory import inventory
from quantkit.sensitivity import ESTIMATORS, NO_INPUTS
from quantkit.sensitivity.measure import Perturbation, Scores, Subject
from tests.sensitivity.networks import perturbed, request_of, sequences, subject_of, transformer

EVERY = sorted(ESTIMATORS)


@pytest.fixture(autouse=True)
def few_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.sensitivity.hessian_trace.MOST_PROBES", 8)


@pytest.fixture(scope="module")
def case() -> tuple[Subject, list[Perturbation]]:
    """A transformer, its first block's formats and two sites."""
    batches = sequences()
    request = request_of(transformer(), batches)
    changes = perturbed(request)
    block = [p for p in changes if p.owner.startswith("blocks.0.mlp") and not p.place[1]]
    return subject_of(request, batches), block + [p for p in changes if p.place[1]][:2]


def run(name: str, subject: Subject, changes: list[Perturbation], seed: int = 0) -> Scores:
    return ESTIMATORS[name](subject, changes, False, torch.Generator().manual_seed(seed))


def measurable(case, name: str) -> tuple[Subject, list[Perturbation]]:
    """The case without its sites for estimators of weights alone."""
    subject, changes = case
    return subject, [p for p in changes if not p.place[1]] if name in NO_INPUTS else changes


def test_all_estimators_are_listed_by_their_names_and_rankings_apart() -> None:
    listed = {
        line.split()[0]: line.partition(" (")[0].replace(",", "").split()[1:] for line in inventory().splitlines()
    }
    damages = "first-order fisher gram hessian-eigenvalue hessian-trace hvp-pairs kl noise pairwise"
    damages += " weight-error weight-error-zd"
    assert set(listed["sensitivity"]) == set(damages.split())
    assert set(listed["rankings"]) == {"depth", "lim", "lim-layer", "zd", "zd-layer"}


@pytest.mark.parametrize("name", EVERY)
def test_same_seed_gives_the_same_scores_and_notes_that_a_profile_can_keep(case, name: str) -> None:
    subject, changes = measurable(case, name)
    torch.manual_seed(1)
    first = run(name, subject, changes)
    torch.manual_seed(2)  # the global generator plays no part
    second = run(name, subject, changes)
    assert np.array_equal(first.damage, second.damage)
    assert np.array_equal(first.standard_error, second.standard_error)
    assert first.damage.shape == first.standard_error.shape == (len(changes),)
    assert first.gram is None or np.allclose(np.diag(first.gram), 2 * first.damage)
    assert json.loads(json.dumps(dict(first.notes), allow_nan=False)) == dict(second.notes)


@pytest.mark.parametrize("name", EVERY)
def test_model_is_left_as_it_was(case, name: str) -> None:
    subject, changes = measurable(case, name)
    model = subject.model
    model.blocks[1].mlp.train()
    model.head.bias.requires_grad_(False)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()] + [m.training for m in model.modules()]
    run(name, subject, changes)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert flags == [p.requires_grad for p in model.parameters()] + [m.training for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model.eval()


def test_narrow_formats_do_more_damage_than_wide_ones(case) -> None:
    """The one thing all damages must agree on."""
    subject, changes = case
    narrow, wide = ([k for k, p in enumerate(changes) if p.format == f] for f in ("w2", "w8"))
    for name in ("fisher", "gram", "hessian-eigenvalue", "hessian-trace", "hvp-pairs", "kl", "noise", "pairwise"):
        damage = run(name, subject, changes).damage
        assert (damage[narrow] > 50 * damage[wide]).all(), name


def test_modules_train_flags_do_not_matter_to_curvature() -> None:
    """Estimators of curvature run in eval mode even when the model is not: dropout would make them noise."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 4)).eval()
    batches = [((torch.randn(12, 6),), {})]
    request = request_of(model, batches)
    subject, changes = subject_of(request, batches), perturbed(request)
    expected = run("hvp-pairs", subject, changes).gram
    subject.model.requires_grad_(False)
    assert np.array_equal(run("hvp-pairs", subject, changes).gram, expected)
