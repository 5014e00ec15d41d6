"""The worked examples of docs/architecture.md run, and the reading tasks name at most three files that exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantkit
from quantkit.rounding.registry import ROUNDINGS
from quantkit.sensitivity.registry import COSTS, ESTIMATORS
from tests.program.models import randn


@pytest.fixture(scope="module")
def page(repo: Path) -> str:
    return (repo / "docs" / "architecture.md").read_text(encoding="utf-8")


@pytest.fixture
def examples(page: str) -> Iterator[dict[str, Any]]:
    """What the examples define; what they register goes again."""
    before = [dict(table) for table in (ROUNDINGS, ESTIMATORS, COSTS)]
    defined: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, defined)
    yield defined
    for table, held in zip((ROUNDINGS, ESTIMATORS, COSTS), before, strict=True):
        table.clear()
        table.update(held)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def test_the_estimator_and_the_rounding_can_be_asked_for(examples) -> None:
    result = quantkit.quantize(
        network(), "7.5 bits", randn(16, 6), sensitivity="squared-error", rounding="toward-zero",
        reconstruction="none", correction=None, progress=False,
    )  # fmt: skip
    assert result.profile is not None and result.profile.damage[0] > 0
    weight, model = result.simulated().weights["0"], network()
    torch.manual_seed(0)
    assert set(result.notes["rounding"].values()) == {"toward-zero"}
    assert weight.dequantize().shape == model[0].weight.shape


def test_the_transform_changes_nothing_that_is_computed(examples) -> None:
    from quantkit.program.layers import Weights

    model, x = network(), randn(5, 6)
    before = model(x)
    examples["scale_pair"](Weights.of_modules(model), "0", "2", 4.0)
    torch.testing.assert_close(model(x), before)
    assert not torch.equal(model[0].weight, network()[0].weight)


def test_the_target_is_used(examples) -> None:
    npu = examples["npu"]
    with pytest.raises(quantkit.QuantkitError, match="not supported by target npu"):
        quantkit.quantize(network(), "16 bits", randn(8, 6), target=npu, schemes=["w3a8"], progress=False)


def test_reading_tasks_name_at_most_three_files(page: str, repo: Path) -> None:
    section = page.split("## Reading tasks")[1].split("## Adding your own")[0]
    tasks = [re.findall(r"`(quantkit/[^`]+)`", line) for line in section.splitlines() if "?" in line]
    assert len(tasks) == 7
    for files in tasks:
        assert 1 <= len(files) <= 3
        assert all((repo / file).is_file() for file in files)
