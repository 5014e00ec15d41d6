"""A bias that is added on several grids, by the calls of one layer or by several layers: each call adds it on its own,
in the file, in the simulated model and on integer kernels alike.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quantkit
from quantkit.backends.onnxruntime.sessions import open_session
from tests.backends.models import BothRanks, ConvTwice, LinearTwice


class Discarded(nn.Module):
    """A call whose result nobody reads: no file has it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(4, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x):
        self.conv(x * 3)
        return self.head(F.relu(self.conv(x)).mean((2, 3)))


class Attempt(Discarded):
    """A call that fails on its way to an output, and another in its place."""

    def forward(self, x):
        try:
            return self.head(F.relu(self.conv(x * 3)).view(len(x), -1))
        except RuntimeError:
            return self.head(F.relu(self.conv(x)).mean((2, 3)))


class Functional(nn.Module):
    """Two branches by one weight that the model turns, with its bias first or by name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8) / 3), nn.Parameter(torch.randn(8))

    def forward(self, x):
        return torch.addmm(self.bias, F.relu(x), self.weight.T) + F.linear(x * 9, bias=self.bias, weight=self.weight)


class Standardized(nn.Module):
    """A weight that is computed anew for each of two calls, which share a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def convolve(self, x):
        weight = self.conv.weight - self.conv.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.conv.bias, padding=1)

    def forward(self, x):
        return self.convolve(F.relu(self.convolve(x)) * 5)


IMAGES, ROWS = torch.Size((48, 4, 8, 8)), torch.Size((64, 6))
NETWORKS = {
    "convolution": (ConvTwice, IMAGES),
    "linear": (LinearTwice, ROWS),
    "sequences and vectors": (BothRanks, torch.Size((32, 5, 6))),
    "discarded": (Discarded, IMAGES),
    "attempt": (Attempt, IMAGES),
    "functional": (Functional, torch.Size((64, 8))),
    "computed weight": (Standardized, IMAGES),
}


@pytest.mark.parametrize("scheme", ["w8a8", "w4a4"])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_file_as_it_is_spelled_computes_the_simulated_model(network: str, scheme: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, shape = NETWORKS[network]
    model, x = make().eval(), torch.randn(shape)
    result = quantkit.quantize(model, scheme, x, reconstruction="none", correction=None, progress=False)
    report = result.export_onnx(tmp_path / "model.onnx")
    assert report.stored_bytes <= result.plan.total_bytes
    spelled = [found for found in report.parity if not found.optimized]
    assert all(found.relative_error <= 1e-5 + 2 * found.rounding_noise for found in spelled)
    assert all(found.rounding_noise < 1e-3 for found in spelled), "of last bits alone"

    with torch.no_grad():
        wanted = result.model(x)
        loaded = quantkit.load(result.save(tmp_path / "saved"), make().eval()).model(x)
    found = open_session(report.path).run(None, {"x": x.numpy()})
    for one, other, ran in zip(_tensors(wanted), _tensors(loaded), found, strict=True):
        assert torch.equal(one, other)
        assert (torch.from_numpy(ran) - one).norm() <= 2e-2 * one.norm()


def _tensors(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)
