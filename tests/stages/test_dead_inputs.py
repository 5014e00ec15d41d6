"""A layer whose inputs are zero on all calibration data gives its bias, whatever the widths, and large ones too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import quantkit


def linear() -> tuple[nn.Module, torch.Tensor]:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    nn.init.constant_(model[0].bias, -1e3)
    return model, torch.randn(32, 8)


def convolution() -> tuple[nn.Module, torch.Tensor]:
    """An input that is zero, and biases that are much larger than the weights."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    nn.init.normal_(model[0].bias, std=100.0)
    return model, torch.zeros(8, 3, 8, 8)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a4", "w2a8"])
@pytest.mark.parametrize("build", [linear, convolution])
def test_the_bias_of_what_reads_zeros_stays_fine(build, scheme: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = build()
    model.eval()
    options = {"reconstruction": "none", "correction": None, "progress": False}
    result = quantkit.quantize(model, scheme, x, rules={"0": "w8a8"} if build is convolution else None, **options)
    layer = "2" if build is linear else "0"
    bias, own = model.get_submodule(layer).bias, result.model.get_submodule(layer).bias
    assert (own - bias).norm() <= 1e-3 * bias.norm()
    if build is linear:
        assert (result.model(x) - model(x)).norm() <= 1e-3 * model(x).norm()
    result.export_onnx(tmp_path / "model.onnx")
