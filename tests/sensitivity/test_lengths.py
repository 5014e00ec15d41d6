"""Outputs with as many classes as a sequence is long: batches of two lengths are compared each for itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import quantkit
from quantkit.program.inputs import Batch
from quantkit.sensitivity import ESTIMATORS
from quantkit.sensitivity.damage import KLDamage, RowDamage, SquaredError
from quantkit.sensitivity.outputs import joined
from quantkit.sensitivity.pair_terms import gram_matrix
from quantkit.sensitivity.sketch import sketch_for
from tests.sensitivity.networks import perturbed, request_of, subject_of

LENGTHS = (5, 8, 5)


class Weighted(nn.Module):
    """Classes, and the weight of every position."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.weigh, self.head = nn.Embedding(12, 6), nn.Linear(6, 1), nn.Linear(6, 4)

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        x = self.table(tokens)
        weights = self.weigh(x)[..., 0].softmax(-1)
        return self.head((weights[..., None] * x).sum(1)), weights


class Pointer(nn.Module):
    """A logit for every position, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.mix, self.score = nn.Embedding(12, 6), nn.Linear(6, 6), nn.Linear(6, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.score(self.mix(self.table(tokens)).relu())[..., 0]


MODELS = [Weighted, Pointer]
OF_DAMAGE = ["kl", "gram", "pairwise", "noise", "fisher", "hvp-pairs", "hessian-trace", "hessian-eigenvalue"]


def batches() -> list[Batch]:
    draw = torch.Generator().manual_seed(0)
    return [((torch.randint(0, 12, (6, n), generator=draw),), {}) for n in LENGTHS]


@pytest.mark.parametrize("damage", [KLDamage(), SquaredError(0.7)], ids=["kl", "mse"])
@pytest.mark.parametrize("temperature", [1.0, 32.0])
def test_products_of_shifts_are_those_of_the_batches_added_up(damage: RowDamage, temperature: float) -> None:
    draw = torch.Generator().manual_seed(0)
    here = [torch.randn(4, n, generator=draw) for n in LENGTHS]
    moved = [[x + 0.1 * torch.randn(x.shape, generator=draw) for x in here] for _ in range(3)]
    apart = sum(
        gram_matrix(damage, x, torch.stack([one[i] for one in moved]) - x, temperature, torch.arange(4))
        for i, x in enumerate(here)
    )
    (rows,) = joined([(x,) for x in here])
    shifts = torch.stack([joined([(x,) for x in one])[0] for one in moved]) - rows
    together = gram_matrix(damage, rows, shifts, temperature, torch.arange(len(rows)))
    assert np.allclose(together, apart, rtol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_every_estimator_of_damage_measures_them(model: type[nn.Module]) -> None:
    request = request_of(model().eval(), batches())
    subject, changes = subject_of(request, batches()), perturbed(request)
    found = {name: ESTIMATORS[name](subject, changes, False, torch.Generator().manual_seed(0)) for name in OF_DAMAGE}
    assert all(np.isfinite(one.damage).all() for one in found.values())
    assert np.allclose(found["gram"].damage, found["kl"].damage)
    assert np.allclose(found["pairwise"].damage, found["kl"].damage)


def test_vocabularies_of_two_sizes_are_made_small_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.sensitivity.sketch.MOST_CLASSES", 300)
    rows = [torch.randn(4, n, generator=torch.Generator().manual_seed(n)) for n in (400, 100)]
    sketch = sketch_for(rows, 2, True, torch.Generator().manual_seed(0))
    assert sketch is not None
    for i, one in enumerate(rows):
        small = sketch(i, one)
        assert torch.allclose(small.softmax(-1).sum(-1), torch.ones(4))
        assert torch.allclose(small.logsumexp(-1), one.logsumexp(-1), atol=1e-4)


@pytest.mark.parametrize("budget", ["w8a8", "8 bits"])
@pytest.mark.parametrize("model", MODELS)
def test_models_that_return_them_are_quantized(model: type[nn.Module], budget: str) -> None:
    result = quantkit.quantize(model().eval(), budget, [args for args, _ in batches()], progress=False)
    assert result.metrics["calibration_damage"] < 0.1
