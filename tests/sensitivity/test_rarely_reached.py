"""Layers that hardly any input reaches: found, named, and given the damage of their like."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import quantkit
from quantkit.numbers.uniform import QuantizedWeight
from quantkit.sensitivity.kl import kl
from quantkit.sensitivity.rarely_reached import FEW, reached_by_few, with_fallback
from tests.sensitivity.networks import classifier, inputs, perturbed, request_of, subject_of


class Experts(nn.Module):
    """A mixture of three experts; the sign and size of a row's first element choose one. The last is rarely chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 10)
        self.experts = nn.ModuleList(nn.Linear(10, 10) for _ in range(3))
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        choice = torch.bucketize(x[:, 0].contiguous(), torch.tensor([0.0, 2.0]))
        h = self.stem(x).relu()
        out = torch.zeros_like(h)
        for i, expert in enumerate(self.experts):
            out = out.index_add(0, (choice == i).nonzero()[:, 0], expert(h[choice == i]))
        return self.head(out.relu())


def mixture() -> Experts:
    torch.manual_seed(0)
    return Experts().eval()


def rows(rare: int) -> Tensor:
    """200 inputs, ``rare`` of them for the last expert; the first two are for the first."""
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(1))
    x[:, 0] = x[:, 0].clamp(-1.5, 1.5)
    x[:2, 0] = -1
    x[-rare:, 0] = 3
    return x


OPTIONS = {"schemes": ["w3a8", "w8a8"], "progress": False, "sensitivity": "kl", "rounding": "nearest"}


def test_expert_that_few_inputs_reach_is_flagged_and_guessed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="quantkit"):
        profile = quantkit.profile(mixture(), rows(5), **OPTIONS)
    few = profile.provenance["guessed_from_weights"]
    assert few.keys() == {"experts.2"}
    assert 1 <= few["experts.2"] < 15, "mixing inputs moves some to another expert"
    assert f"too few calibration inputs reach experts.2 ({few['experts.2']}): the damage of these" in caplog.text
    damage = dict(zip(profile.entries, profile.damage, strict=True))
    plenty = quantkit.profile(mixture(), rows(60), **OPTIONS)
    assert "guessed_from_weights" not in plenty.provenance
    for format in ("w3", "w8"):
        others = [damage[name, format] for name in ("stem", "experts.0", "experts.1", "head")]
        assert 0.5 * min(others) < damage["experts.2", format] < 2 * max(others)
        k = profile.entries.index(("experts.2", format))
        assert np.flatnonzero(profile.gram[k]).tolist() == [k]


def test_experts_that_the_first_samples_do_not_reach_are_still_layers() -> None:
    profile = quantkit.profile(mixture(), rows(60), **OPTIONS)
    assert {name: layer.reason for name, layer in profile.layers.items() if layer.reason} == {}


def test_guess_is_the_median_damage_per_error_of_the_same_format() -> None:
    batches = inputs()
    request = request_of(classifier(), batches)
    changes = perturbed(request)
    scores = kl(subject_of(request, batches), changes, False, torch.Generator())
    guessed = with_fallback(replace(scores, gram=np.diag(2 * scores.damage)), changes, request.ready.weights, {"2": 3})
    for k, p in enumerate(changes):
        if p.owner != "2" or not isinstance(p.change, QuantizedWeight):
            assert guessed.damage[k] == scores.damage[k]
            continue

        def error(one) -> float:
            weight = request.ready.weights[one.owner].detach()
            return float(((one.change.dequantize() - weight) ** 2).sum() / (weight**2).sum())

        others = [(scores.damage[m], q) for m, q in enumerate(changes) if (q.owner, q.format) in _others(p.format)]
        expected = np.median([d / error(q) for d, q in others]) * error(p)
        assert guessed.damage[k] == pytest.approx(expected, rel=1e-4)
        assert guessed.gram[k, k] == 2 * guessed.damage[k]
    assert guessed.notes["guessed_from_weights"] == {"2": 3}
    assert with_fallback(scores, changes, request.ready.weights, {}) is scores


def _others(format: str) -> list[tuple[str, str]]:
    return [("0", format), ("4", format)]


@pytest.mark.parametrize(("seen", "samples", "few"), [(FEW - 1, 500, True), (FEW, 500, False), (5, 5, False)])
def test_few_is_a_fixed_number_or_fewer_than_the_samples(seen: int, samples: int, few: bool) -> None:
    assert bool(reached_by_few({"layer": seen}, samples)) is few
