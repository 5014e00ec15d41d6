"""Estimators without pair terms against slow twins: measured one by one, by noise, by first order, by Fisher."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quantkit.errors import InvalidRequest
from quantkit.numbers.uniform import QuantizedWeight
from quantkit.program.inputs import Batch
from quantkit.sensitivity import noise as noise_module
from quantkit.sensitivity.damage import KLDamage, SquaredError
from quantkit.sensitivity.first_order import first_order
from quantkit.sensitivity.fisher import fisher
from quantkit.sensitivity.hvp_pairs import hvp_pairs
from quantkit.sensitivity.kl import kl
from quantkit.sensitivity.measure import Perturbation, Subject
from quantkit.sensitivity.noise import noise, noisy_weight
from quantkit.sensitivity.output_gradients import per_sample
from quantkit.stages.request import Request
from tests.sensitivity.explicit import SITES, WEIGHTS, Explicit
from tests.sensitivity.networks import (
    by_hand,
    classifier,
    generator,
    inputs,
    perturbed,
    request_of,
    sequences,
    subject_of,
    transformer,
)


@pytest.fixture(scope="module")
def case() -> tuple[Request, Subject, list[Perturbation], Tensor]:
    batches = inputs(40)
    request = request_of(classifier(), batches)
    return request, subject_of(request, batches), perturbed(request), torch.cat([args[0] for args, _ in batches])


def test_damage_alone_is_the_mean_divergence_with_its_standard_error_and_no_pair_terms(case) -> None:
    request, subject, changes, x = case
    scores = kl(subject, changes, False, generator())
    rows = [KLDamage().rows(by_hand(request, x, []), by_hand(request, x, [p])) for p in changes]
    rows = torch.stack(rows).double().numpy()
    assert np.allclose(scores.damage, rows.mean(1), rtol=1e-3, atol=1e-7)
    assert np.allclose(scores.standard_error, rows.std(1, ddof=1) / len(x) ** 0.5, rtol=1e-3, atol=1e-7)
    assert scores.gram is None


def test_noise_is_uniform_and_as_wide_as_the_step_of_each_channel(case) -> None:
    _, _, changes, _ = case
    codes = changes[1].change
    assert isinstance(codes, QuantizedWeight)
    weight, draw = torch.randn(codes.codes.shape), generator()
    noise = torch.stack([noisy_weight(weight, codes, draw) - weight for _ in range(4000)]) / codes.scale
    assert float(noise.min()) >= -0.5001 and float(noise.max()) <= 0.5001
    assert torch.allclose(noise.var(0), torch.tensor(1 / 12), atol=0.01)
    assert float(noise.mean()) == pytest.approx(0, abs=1e-3)


def noisy_classifier(request: Request, x: Tensor, one: Perturbation, draw: torch.Generator) -> Tensor:
    """The classifier's output with noise in place of one perturbation, layer by layer."""
    model = request.ready.model
    for site, name in zip(SITES, WEIGHTS, strict=True):
        layer = model.get_submodule(name)
        weight = layer.weight.detach()
        if one.place == (site, True):
            x = x + one.change.scale * (torch.rand(x.shape, generator=draw) - 0.5)
        if one.place == (name, False):
            weight = weight + one.change.scale * (torch.rand(weight.shape, generator=draw) - 0.5)
        x = x @ weight.T + layer.bias.detach()
        x = x.relu() if name != WEIGHTS[-1] else x
    return x


def test_noise_damage_is_the_mean_over_draws_of_a_slow_twin(case) -> None:
    request, _, changes, x = case
    subject = Subject(request.ready.model, [((x,), {})], {s.name: s for s in request.ready.sites})
    scores = noise(subject, changes, False, generator(3))
    seeds = torch.randint(1 << 62, (len(changes),), generator=generator(3)).tolist()
    reference = by_hand(request, x, [])
    for k, p in enumerate(changes):
        draw = generator(seeds[k])  # a seed for each, so that none depends on what was measured before it
        outputs = [noisy_classifier(request, x, p, draw) for _ in range(noise_module.DRAWS)]
        expected = np.mean([float(KLDamage().rows(reference, o).double().mean()) for o in outputs])
        assert scores.damage[k] == pytest.approx(expected, rel=1e-3, abs=1e-7), p


def test_more_draws_of_noise_converge(case, monkeypatch) -> None:
    _, subject, changes, _ = case
    spread = {}
    for draws in (2, 32):
        monkeypatch.setattr(noise_module, "DRAWS", draws)
        spread[draws] = np.std([noise(subject, changes[3:4], False, generator(s)).damage for s in range(10)])
    assert spread[32] < 0.5 * spread[2]


def test_first_order_is_the_size_of_the_slope_of_the_cross_entropy_to_predicted_classes(case) -> None:
    request, subject, changes, _ = case
    exact = Explicit(request, subject.batches)
    moved = exact.displacements(changes)
    zeros = torch.zeros(moved.shape[1], dtype=torch.float64, requires_grad=True)
    logits = exact.logits(zeros)
    (slope,) = torch.autograd.grad(nn.functional.cross_entropy(logits, logits.argmax(-1)), zeros)
    scores = first_order(subject, changes, False, generator())
    assert np.allclose(scores.damage, np.abs(moved @ slope.numpy()), rtol=1e-3, atol=1e-7)


def test_first_order_of_outputs_that_are_no_classes_is_refused() -> None:
    batches = inputs(12)
    request = request_of(classifier(1), batches)
    with pytest.raises(InvalidRequest, match=r"no class scores.*'gram'"):
        first_order(subject_of(request, batches), perturbed(request), False, generator())


def averaged_fisher(subject: Subject, changes: list[Perturbation], seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean over seeds, and its standard error."""
    found = np.array([fisher(subject, changes, False, generator(s)).damage for s in range(seeds)])
    return found.mean(0), found.std(0, ddof=1) / seeds**0.5


def test_fisher_is_on_average_the_exact_second_order(case) -> None:
    request, subject, changes, _ = case
    exact = Explicit(request, subject.batches)
    moved = exact.displacements(changes)
    expected = 0.5 * np.einsum("ki,ij,kj->k", moved, exact.hessian, moved)
    mean, error = averaged_fisher(subject, changes, 12)
    assert (np.abs(mean - expected) < 3.5 * error).all()  # the largest of twelve
    assert (error < 0.1 * expected).all()


def test_fisher_of_sequences_and_of_squared_error_is_on_average_the_exact_second_order() -> None:
    """Rows of one sample share its inner product; outputs that are no classes get random signs for labels."""
    for model, batches, loss in ((transformer(), sequences(), "kl"), (classifier(1), inputs(24), "mse")):
        request = request_of(model, batches)
        subject = subject_of(request, batches)
        subject.loss = loss
        changes = [p for p in perturbed(request) if p.format in ("w4", "a8")]
        expected = hvp_pairs(subject, changes, False, generator()).damage
        mean, error = averaged_fisher(subject, changes, 10)
        rounding = 1e-6 * np.abs(expected)  # every draw of the squared error's one output is the same
        assert (np.abs(mean - expected) < 4 * error + rounding).all()  # the largest of two dozen
        assert np.median(error / expected) < 0.1


def test_labels_are_drawn_from_the_model_and_give_the_metric_of_the_damage() -> None:
    logits = torch.tensor([[1.0, 0.0, -2.0]]).expand(200_000, 3)
    p = logits[0].double().softmax(-1)
    drawn = KLDamage().cotangent(logits, generator()).double()
    assert torch.allclose(drawn.T @ drawn / len(drawn), torch.diag(p) - torch.outer(p, p), atol=5e-3)
    signs = SquaredError(4.0).cotangent(logits, generator()).double()
    assert torch.allclose(signs.T @ signs / len(signs), torch.eye(3, dtype=torch.float64) / 4, atol=5e-3)


def test_inner_products_are_taken_over_all_elements_of_a_sample() -> None:
    slopes, shift = torch.randn(2, 6, 3, 2, generator=generator()), torch.randn(6, 3, 2, generator=generator(1))
    products = (slopes * shift).double()
    assert torch.allclose(per_sample(slopes, shift, 6), products.sum((2, 3)), atol=1e-5)
    for count in (2, 4):  # six rows may be three of each of two samples, or both samples at each of three times
        together = per_sample(slopes, shift, count)
        assert together.shape == (2, 1) and torch.allclose(together[:, 0], products.sum((1, 2, 3)), atol=1e-5)


class Tied(nn.Module):
    """One weight read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.again.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.again(self.first(x).relu()).relu())


def test_fisher_sums_over_all_calls_that_read_a_weight() -> None:
    torch.manual_seed(0)
    batches: list[Batch] = inputs(24)
    request = request_of(Tied().eval(), batches)
    subject = subject_of(request, batches)
    weights = [p for p in perturbed(request) if p.format == "w4"]
    expected = hvp_pairs(subject, weights, False, generator()).damage
    mean, error = averaged_fisher(subject, weights, 12)
    assert (np.abs(mean - expected) < 3.5 * error).all()


class Tokens(nn.Module):
    """Embedded tokens, mixed over positions by a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = (
            nn.Embedding(9, 6, padding_idx=0),
            nn.Conv1d(6, 6, 3, padding=1),
            nn.Linear(6, 4),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(tokens).transpose(1, 2)).relu().transpose(1, 2))


def convolutions() -> nn.Module:
    """Stride, padding, groups, bias or none, and a transposed convolution."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 4, 2, stride=2),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, groups=2, dilation=2),
        nn.Flatten(),
        nn.Linear(24, 4),
    )


@pytest.mark.parametrize("kind", ["tokens", "convolutions"])
def test_fisher_knows_every_kind_of_layer(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "tokens":
        model, x = Tokens(), torch.randint(0, 9, (16, 5))
    else:
        model, x = convolutions(), torch.randn(16, 3, 6, 6)
    request = request_of(model.eval(), [((x,), {})])
    subject = subject_of(request, [((x,), {})])
    parameters = {n for n, weight in request.ready.weights.layers.items() if weight.region is None}
    weights = [p for p in perturbed(request) if p.format in ("w2", "w4") and p.owner in parameters]
    expected = hvp_pairs(subject, weights, False, generator()).damage
    mean, error = averaged_fisher(subject, weights, 12)
    assert len(weights) >= 5 and (expected > 0).all()
    assert (np.abs(mean - expected) < 3.5 * error).all()
