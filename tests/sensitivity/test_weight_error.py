"""Damage without data, against sums written out in numpy, and what it must not depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quantkit.errors import InvalidRequest
from quantkit.formats import Scheme
from quantkit.numbers.uniform import SiteRange
from quantkit.rounding.weights import quantize_weight
from quantkit.sensitivity import ESTIMATORS, NO_INPUTS
from quantkit.sensitivity.measure import Perturbation, Scores, Subject
from quantkit.sensitivity.weight_error import NORMAL_ZD, channel_error, channel_zd

NAMES = ("conv", "head")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"conv": nn.Conv2d(3, 5, 3), "head": nn.Linear(7, 4)})


def perturbations(model: nn.Module) -> list[Perturbation]:
    found = []
    for name in NAMES:
        formats = [Scheme.parse(text).weight for text in ("w2", "w4", "w8")]
        weights = quantize_weight(model[name].weight, formats, rounding="hqq").weights
        found += [Perturbation(name, str(f), weights[f]) for f in formats]
    return found


def scores(model: nn.Module, sensitivity: str) -> Scores:
    generator = torch.Generator().manual_seed(0)
    return ESTIMATORS[sensitivity](Subject(model, [], {}), perturbations(model), False, generator)


def by_hand(weight: np.ndarray, rounded: np.ndarray) -> tuple[float, float]:
    """(relative error, ZD), channel by channel."""
    errors, above, count = [], 0, 0
    for row, other in zip(weight.reshape(len(weight), -1), rounded.reshape(len(weight), -1), strict=True):
        errors.append(((other - row) ** 2).sum() / (row**2).sum())
        above += int(((row - row.mean()) / row.std() > 1).sum())
        count += row.size
    return float(np.mean(errors)), above / count


def test_figures_are_those_written_out_by_hand() -> None:
    model = network()
    for sensitivity in sorted(NO_INPUTS):
        found = scores(model, sensitivity)
        for p, damage in zip(perturbations(model), found.damage, strict=True):
            weight = model[p.owner].weight.detach().double().numpy()
            error, zd = by_hand(weight, p.change.dequantize().double().numpy())
            assert damage == pytest.approx(error * (NORMAL_ZD / zd if "zd" in sensitivity else 1), rel=1e-9)
        assert not found.ranking and found.gram is None
        assert (np.diff(found.damage.reshape(2, 3), axis=1) < 0).all()  # more bits, less damage


def heavy(rows: int = 40, inputs: int = 500) -> Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("factor", ["same", "each channel's own"])
def test_scales_of_channels_do_not_count(factor: str) -> None:
    weight, rounded = heavy(), heavy().mul(8).round().div(8)
    scale = torch.tensor(1e-3) if factor == "same" else torch.rand(40, 1, generator=torch.Generator()) + 0.1
    assert channel_error(weight * scale, rounded * scale) == pytest.approx(channel_error(weight, rounded), rel=1e-5)
    assert channel_zd(weight * scale) == channel_zd(weight)


def test_zd_of_a_normal_distribution_and_of_heavier_tails() -> None:
    assert channel_zd(heavy()) == pytest.approx(NORMAL_ZD, abs=0.005)
    assert channel_zd(heavy() ** 3) < 0.12


def test_channels_of_zeros_count_for_nothing() -> None:
    weight, rounded = heavy(), heavy().mul(4).round().div(4)
    alone = channel_error(weight, rounded), channel_zd(weight)
    empty = torch.zeros(3, 500)
    padded = torch.cat([weight, empty])
    assert (channel_error(padded, torch.cat([rounded, empty])), channel_zd(padded)) == pytest.approx(alone)
    assert channel_error(empty, empty) == 0 and channel_zd(empty) == NORMAL_ZD


def test_activations_are_refused() -> None:
    site = Perturbation("conv", "a8", SiteRange(0.1, 0, 8))
    with pytest.raises(InvalidRequest, match=r"says nothing of activations, and 'conv' would be a8\. Use weight-only"):
        ESTIMATORS["weight-error"](Subject(network(), [], {}), [site], False, torch.Generator())
