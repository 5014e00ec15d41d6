"""Files of models with adaptive pools take images of all sizes; a size that only the exporter fixes is said."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantkit.backends.onnxruntime.adaptive_pools import _POOLS, _pooled
from tests.backends.test_dynamic_sizes import inputs_of, pictures, quantized, require_the_same
from tests.program.models import Net, randn

POOLS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "mean of halves": (nn.AdaptiveAvgPool2d(2), 4),
    "mean of thirds": (nn.AdaptiveAvgPool2d(3), 9),
    "largest": (nn.AdaptiveMaxPool2d(2), 4),
    "one axis": (lambda x: F.adaptive_max_pool1d(F.adaptive_avg_pool2d(x, (None, 1)).flatten(2), 3), 3),
}


def pooling(pool: Callable[[Tensor], Tensor], places: int) -> nn.Module:
    torch.manual_seed(0)

    def forward(self, x):
        return self.head(pool(F.relu(self.conv(x))).flatten(1))

    return Net(forward, conv=nn.Conv2d(3, 8, 3, padding=1), head=nn.Linear(8 * places, 4)).eval()


@pytest.mark.parametrize("pool", _POOLS, ids=lambda pool: pool.__name__)
@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_windows_are_those_of_torch(pool: Callable[..., Tensor], count: int) -> None:
    axes, reduce = _POOLS[pool]
    x = found = randn(2, 3, *(7, 11, 10)[:axes])
    for axis in range(-axes, 0):
        found = _pooled(found, axis, count, reduce)
    torch.testing.assert_close(found, pool(x, count))


@pytest.mark.parametrize("name", POOLS)
def test_images_of_all_sizes_are_pooled(name: str, tmp_path: Path) -> None:
    result = quantized(pooling(*POOLS[name]), [pictures(4, 8, 8), pictures(4, 12, 9)])
    report = result.export_onnx(tmp_path / "model.onnx")
    assert inputs_of(report.path) == {"args.0": ["batch", 3, "height", "width"]} and not report.conditions
    require_the_same(result, report.path, pictures(2, 7, 13), pictures(1, 5, 5))


def test_images_of_one_size_are_pooled_as_they_were(tmp_path: Path) -> None:
    report = quantized(pooling(*POOLS["mean of halves"]), [pictures(4, 8, 8)]).export_onnx(tmp_path / "model.onnx")
    assert not {"Gather", "GatherND", "Range"} & {node.op_type for node in onnx.load(report.path).graph.node}


def test_a_size_that_the_exporter_fixes_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Windows are written out where the places of the largest are asked for."""
    pool = nn.AdaptiveMaxPool2d(2, return_indices=True)
    result = quantized(pooling(lambda x: pool(x)[0], 4), [pictures(4, 8, 8), pictures(4, 12, 8)])
    with caplog.at_level(logging.INFO, logger="quantkit"):
        report = result.export_onnx(tmp_path / "model.onnx")
    assert inputs_of(report.path) == {"args.0": ["batch", 3, 8, 8]}
    assert "takes 8 along axis 2 of 'args.0' only" in caplog.text
    require_the_same(result, report.path, pictures(2, 8, 8))
