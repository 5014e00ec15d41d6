"""Segments hold every layer once and, one after the other, compute what the network computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quantkit.program.program import Part, Program
from quantkit.program.segments import LAYERS, Segment, blocks_of
from quantkit.targets import Target
from quantkit.transforms.prepare import Prepared, prepare
from tests.program.models import randn
from tests.program.replays import program_of
from tests.stages.networks import ConvReused, MobileNet


class Chain(nn.Module):
    """Residual blocks between a stem and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.first = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.second = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        for one, other in zip(self.first, self.second, strict=True):
            x = torch.relu(other(torch.relu(one(x))) + x)
        return self.head(x.mean((2, 3)))


def cut(model: nn.Module) -> tuple[Prepared, Program, list[Segment]]:
    batch = (randn(4, 3, 8, 8, seed=1),), {}
    ready = prepare(model, [batch], Target.load("onnxruntime-cpu"))
    program = program_of(ready.model, batch, ((randn(4, 3, 8, 8, seed=2),), {}))
    assert program is not None
    return ready, program, blocks_of(program, ready.quantizable, {site.place for site in ready.sites})


def test_residual_blocks_come_out_as_blocks() -> None:
    _, _, blocks = cut(Chain().eval())
    assert [block.layers for block in blocks] == [
        ("stem", "first.0", "second.0"),
        ("first.1", "second.1"),
        ("first.2", "second.2", "head"),
    ]


@pytest.mark.parametrize("model", [Chain, MobileNet, ConvReused], ids=lambda model: model.__name__)
def test_blocks_one_after_the_other_are_the_network(model: type[nn.Module]) -> None:
    ready, program, blocks = cut(model().eval())
    assert sorted(name for block in blocks for name in block.layers) == sorted(ready.quantizable)
    assert len(blocks) == 1 or min(len(block.layers) for block in blocks) >= LAYERS
    batch = (randn(4, 3, 8, 8, seed=3),), {}
    values = program.entering(ready.model, batch)
    shapes: dict[int, tuple[int, ...]] = {}
    with torch.no_grad():
        for block in blocks:
            part = Part(block.start, block.stop, shapes)
            found = program.replay(values, program.state_of(ready.model), block.leaving, part=part)
            values = dict(zip(block.leaving, found, strict=True))
        torch.testing.assert_close(values[program.output], ready.model(*batch[0]))
