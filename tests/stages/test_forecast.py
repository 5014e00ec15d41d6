"""What a profile will take is told before it is measured."""

from __future__ import annotations

import torch
from torch import nn

from quantkit.stages.forecast import forecast
from quantkit.stages.request import make_ready


def test_fewer_forwards_than_formats_take_less_time():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(12)]
    model, inputs = nn.Sequential(*layers, nn.Linear(64, 4)).eval(), torch.randn(512, 64)
    schemes = [f"w{bits}g{group}" for bits in range(2, 9) for group in (16, 32, 64)]
    found = {
        name: forecast(make_ready(model, inputs, schemes=schemes, sensitivity=name, rounding="nearest"))
        for name in ("gram", "fisher")
    }
    assert found["fisher"].forwards < found["fisher"].formats < found["gram"].forwards
    assert 0 < found["fisher"].measuring_seconds < found["gram"].measuring_seconds
