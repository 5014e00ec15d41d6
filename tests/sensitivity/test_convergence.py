"""More data makes every estimate converge: twice the inputs, about 0.7 times the spread between draws of inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantkit.sensitivity import ESTIMATORS, NO_INPUTS, RANKINGS
from quantkit.sensitivity.measure import Perturbation, Scores
from tests.sensitivity.networks import classifier, inputs, perturbed, request_of, subject_of

DRAWS = 10


@pytest.fixture(scope="module")
def changes() -> list[Perturbation]:
    return [p for p in perturbed(request_of(classifier(), inputs())) if p.format in ("w2", "w4")]


def scores_on(name: str, count: int, seed: int, changes: list[Perturbation]) -> Scores:
    batches = inputs(count, seed=seed)
    subject = subject_of(request_of(classifier(), batches), batches)
    return ESTIMATORS[name](subject, changes, False, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name not in RANKINGS | NO_INPUTS])
def test_twice_the_data_narrows_the_spread(name: str, changes: list[Perturbation]) -> None:
    spread = {}
    for count in (24, 48):
        found = np.array([scores_on(name, count, 1000 * count + seed, changes).damage for seed in range(DRAWS)])
        spread[count] = found.std(0) / found.mean(0)
    ratio = float(np.exp(np.mean(np.log(spread[48] / spread[24]))))
    assert ratio < 0.9, ratio
