"""The front of a profile: plans in order, none beaten by another, none better to be had for the same bytes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

import quantkit
from quantkit.allocation.allocate import allocate
from quantkit.allocation.pareto import pareto
from quantkit.errors import InvalidRequest
from tests.allocation.test_operating_point import profile_of


@pytest.mark.parametrize("limit", ["size", "average_bits"])
def test_front_runs_from_the_cheapest_to_the_least_damage(limit: str) -> None:
    profile = profile_of(8, 0)
    front = pareto(profile, limit=limit)
    assert {str(s) for s in front[0].schemes.values()} == {"w2a8"}
    assert len(front) > 8
    for one, other in pairwise(front):
        assert one.size_bytes < other.size_bytes
        assert one.predicted_damage > other.predicted_damage


def test_plan_on_the_front_is_what_its_own_budget_gets_nearly() -> None:
    profile = profile_of(6, 1)
    for plan in pareto(profile):
        best = allocate(profile, f"{plan.total_bytes} B")
        assert plan.predicted_damage == pytest.approx(profile.predict(plan.schemes, plan.sites))
        assert best.predicted_damage <= plan.predicted_damage * (1 + 1e-9)
        assert plan.predicted_damage <= 1.5 * best.predicted_damage


def test_no_plan_of_a_front_is_beaten_by_another() -> None:
    """Swaps may make a vertex cheaper than the one before it."""
    for seed in range(60):
        front = pareto(profile_of(5, 100 + seed))
        for one, other in pairwise(front):
            assert one.size_bytes < other.size_bytes
            assert one.predicted_damage > other.predicted_damage


def test_fronts_along_what_a_profile_does_not_have_are_refused() -> None:
    network = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    weights_only = quantkit.profile(network, x, schemes=["w4", "w8"], progress=False)
    with pytest.raises(InvalidRequest, match="no front along activation_bytes"):
        pareto(weights_only, limit="activation_bytes")
    with pytest.raises(InvalidRequest, match="bops"):
        pareto(quantkit.profile(network, progress=False), limit="bops")


def test_schemes_can_be_restricted_and_an_unknown_limit_is_refused() -> None:
    profile = profile_of(4, 2)
    plans = pareto(profile, schemes=["w2a8", "w8a8"])
    assert {str(s) for plan in plans for s in plan.schemes.values()} == {"w2a8", "w8a8"}
    with pytest.raises(
        InvalidRequest,
        match=r"'sise' is not known; known: size, average_bits, bops, latency, activation_bytes\. Did you mean 'size'",
    ):
        pareto(profile, limit="sise")
