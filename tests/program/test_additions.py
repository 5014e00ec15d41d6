"""Sums of a large and a small operand stay in float: no grid has room for both."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from quantkit.targets import Target
from quantkit.targets.roles import ADDITION_RESULT
from quantkit.transforms.prepare import prepare
from tests.program.models import randn

TARGET = Target.load("onnxruntime-cpu")


class MaskedPooling(nn.Module):
    """A text network that pushes padded positions down by ``big`` before a convolution and the maximum over time."""

    def __init__(self, big: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.big = big
        self.a, self.b, self.head = nn.Conv1d(8, 16, 3, padding=1), nn.Conv1d(16, 16, 1), nn.Linear(16, 4)
        self.c = nn.Conv1d(16, 16, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.b(self.a(x).relu())
        return self.head(self.c(y + ((1 - mask[:, None]) * self.big).expand_as(y)).amax(-1))


class MaskedScores(nn.Module):
    """Scores of one head, mixed by a convolution, masked in place and mixed again."""

    def __init__(self, big: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.big = big
        self.q, self.k, self.mix = nn.Conv1d(8, 8, 1), nn.Conv1d(8, 8, 1), nn.Conv2d(1, 1, 1)
        self.again = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.mix((self.q(x).transpose(1, 2) @ self.k(x))[:, None])
        scores += ((1 - mask[:, None, None]) * self.big).expand_as(scores)
        return self.again(scores).softmax(-1)


@pytest.mark.parametrize("kind", [MaskedPooling, MaskedScores])
@pytest.mark.parametrize(("big", "drowned"), [(-1.0, False), (-1e4, True)])
def test_a_large_mask_keeps_its_addition_in_float(kind: type[nn.Module], big: float, drowned: bool) -> None:
    mask = (torch.arange(12)[None] < torch.tensor([[5], [9], [12], [7]])).float()
    ready = prepare(kind(big).eval(), [((randn(4, 8, 12), mask), {})], TARGET)
    found = [ADDITION_RESULT in site.roles for site in ready.sites if str(site.place) == "/add"]
    assert found == [not drowned]  # a layer reads it in codes either way
    assert [str(key) for key in ready.float_sums] == ["/add"] * drowned
