"""GPTQ of groups beside a plain one: no more error in layers, less damage to a language model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantkit.formats import Scheme
from quantkit.rounding import Moments
from quantkit.rounding.weights import quantize_weight
from tests.rounding.plain_gptq import rounded
from tests.rounding.test_gptq import uneven_hessian
from tests.rounding.test_weights import output_error


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_more_error_in_layers(bits: int) -> None:
    shares = []
    for seed in range(10):
        weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        hessian, format = uneven_hessian(1, 32, seed), Scheme.parse(f"w{bits}g8z").weight
        own = quantize_weight(weight, [format], Moments(hessian)).weights[format].dequantize()
        plain = rounded(weight, hessian[0], bits, 8)
        shares.append(float(output_error(weight, own, hessian) / output_error(weight, plain, hessian)))
    assert max(shares) < 1.1
    assert sum(shares) / len(shares) < 1.01


@pytest.mark.slow
def test_less_damage_to_a_language_model(data_dir: Path) -> None:
    pytest.importorskip("transformers")
    from tools.study_gptq import by_quantkit, by_reference, calibration_windows, kl, language_model, unseen_windows

    model, ids, unseen = language_model(data_dir), calibration_windows(data_dir, 8, 0), unseen_windows(data_dir, 4)
    model.model.layers = model.model.layers[:2]  # that, and a head, are enough to tell
    model.config.num_hidden_layers = 2
    own, plain = (kl(model, work(model, ids, 2, 64), unseen) for work in (by_quantkit, by_reference))
    assert own < plain
