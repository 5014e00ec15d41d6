"""Effort after the profile: plans improved on measured damage, inside the budget, with what it took written down."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

import quantkit
from quantkit.errors import InvalidRequest
from quantkit.plan import Plan, Profile
from quantkit.sensitivity.around import PlanDamage
from quantkit.sensitivity.damage import SOFTENED
from quantkit.stages.operating_point import DRAWS, EFFORTS, draws_of, measurements_of
from quantkit.stages.options import Run
from quantkit.stages.profile import Evaluator, evaluator_of
from quantkit.stages.request import make_ready


def network() -> nn.Sequential:
    """Deep and narrow, so that two bits hurt and layers depend on each other."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(216, 6)).eval()
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.data *= 2.5
    return model


def images() -> Tensor:
    return torch.randn(40, 3, 6, 6, generator=torch.Generator().manual_seed(1))


SCHEMES = ["w2a8", "w3a8", "w4a8"]


@cache
def evaluator() -> Evaluator:
    return evaluator_of(make_ready(network(), [images()], schemes=SCHEMES), Run(progress=False))


def measured_damage(profile: Profile, plan: Plan) -> float:
    """Damage of a plan on the inputs of the profile, measured anew."""
    measured = PlanDamage(evaluator().subject, evaluator().perturbations, False, SOFTENED)
    return measured.plans([profile.chosen(plan.schemes, plan.sites)])[0]


@cache
def quantized(effort: str) -> quantkit.Result:
    """From a start that leaves room."""
    options = {"schemes": SCHEMES, "progress": False, "solver": "uniform", "effort": effort}
    return quantkit.quantize(network(), "2.8 bits", [images()], **options)


@pytest.mark.parametrize("effort", ["balanced", "thorough"])
def test_more_effort_measures_better_and_says_what_it_took(effort: str) -> None:
    fast, better = quantized("fast"), quantized(effort)
    assert better.plan.average_bits <= 2.8
    assert better.profile == fast.profile
    before, after = (measured_damage(fast.profile, one.plan) for one in (fast, better))
    assert after < before
    took = better.plan.provenance["operating_point"]
    assert took["measurements"] <= EFFORTS[effort] * len(fast.profile.entries)
    accepted = [step["damage"] for step in took["steps"] if step["accepted"]]
    assert accepted == sorted(accepted, reverse=True)
    assert (accepted[0], accepted[-1]) == (pytest.approx(before), pytest.approx(after))
    assert "operating_point" not in fast.plan.provenance


def test_unknown_effort_is_refused() -> None:
    with pytest.raises(
        InvalidRequest, match=r"Unknown effort 'fats'; known: fast, balanced, thorough\. Did you mean 'fast'"
    ):
        quantkit.quantize(network(), "3 bits", [images()], effort="fats")


def forgiving() -> nn.Module:
    """Minds neither left and right nor where things are, as far as edges go."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


@pytest.mark.parametrize("side, alike", [(16, False), (6, True)])
def test_plans_are_compared_on_changed_images_where_the_network_hardly_minds(side: int, alike: bool) -> None:
    shades = torch.randn(40, 3, 1, 1, generator=torch.Generator().manual_seed(2))
    inputs = shades + 0.1 * torch.randn(40, 3, side, side, generator=torch.Generator().manual_seed(3))
    measured = evaluator_of(make_ready(forgiving(), [inputs], schemes=["w4a8", "w8a8"]), Run(progress=False))
    compared = measurements_of(measured, seed=0, progress=False).subject
    (before, _), (after, _) = measured.subject.batches[0], compared.batches[0]
    assert torch.equal(before[0], after[0]) == alike  # below eight pixels it is no image
    assert compared.model is measured.subject.model


def test_further_draws_are_other_inputs_and_there_are_none_of_tokens() -> None:
    first, second = (measurements_of(evaluator(), seed, progress=False).subject.batches[0][0][0] for seed in (0, 1))
    assert draws_of(evaluator(), 0, progress=False).draws == DRAWS
    assert first.shape == second.shape and not torch.equal(first, second)
    reader = nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Linear(40, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    tokens = torch.randint(20, (32, 5), generator=torch.Generator().manual_seed(0))
    of_tokens = evaluator_of(make_ready(reader, [tokens], schemes=["w4a8", "w8a8"]), Run(progress=False))
    assert draws_of(of_tokens, 0, progress=False).draws == 1
