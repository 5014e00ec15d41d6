"""A real model computes what the simulated one does, and holds no more than the plan's bytes."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

from quantkit.formats import WeightFormat
from quantkit.runtime.real import PackedLayer, RealModel
from quantkit.simulation.model import SimulatedModel
from quantkit.simulation.quantized import QuantizedModel
from tests.backends.helpers import prepared, simulate
from tests.backends.models import ConvTwice, InPlace, LinearTwice, Residual, TwoInputs


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


class Padded(nn.Module):
    """The options of a convolution by name, but for the first of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.conv.weight, self.conv.bias, padding=2, dilation=1)


NETWORKS = {
    "options by name": (Padded, ((images(2, 3, 8, 8),), {})),
    "residual": (Residual, ((images(4, 3, 12, 12),), {})),
    "two inputs": (TwoInputs, ((images(4, 2, 6, 6),), {"features": images(4, 5)})),
    "in place": (InPlace, ((images(2, 3, 8, 8),), {})),
    "one layer on two inputs": (ConvTwice, ((images(2, 4, 6, 6),), {})),
    "one linear layer on two inputs": (LinearTwice, ((images(3, 6),), {})),
}


def simulated(name: str, bits: int = 8) -> tuple[SimulatedModel, tuple]:
    torch.manual_seed(0)
    build, batch = NETWORKS[name]
    return simulate(prepared(build().eval(), batch), batch, bits), batch


def leaves(value: object) -> list[Tensor]:
    return torch.utils._pytree.tree_flatten(value)[0]


@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_real_outputs_are_the_simulated_ones(name: str, bits: int, expand: bool) -> None:
    model, (args, kwargs) = simulated(name, bits)
    before = copy.deepcopy(model.state_dict())
    real = RealModel(model, expand)
    step = max(range.scale for range in model.ranges.values())  # a value on the edge between two codes may take either
    with torch.no_grad():
        pairs = zip(leaves(real(*args, **kwargs)), leaves(model(*args, **kwargs)), strict=True)
    for found, wanted in pairs:
        assert (found - wanted).abs().max() <= 2 * step and (found - wanted).abs().mean() < 0.02 * step
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_take_the_bytes_of_their_formats(bits: int) -> None:
    model, _ = simulated("residual", bits)
    wanted = 0
    for name, module in model.model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            shape = model.floats[name].shape
            wanted += WeightFormat(str(bits)).storage_bytes(shape) if name in model.weights else 4 * shape.numel()
    real, expanded = RealModel(model), RealModel(model, expand=True)
    assert real.weight_bytes == expanded.weight_bytes == wanted
    assert real.expanded_bytes == 0 < expanded.expanded_bytes
    held = {p.untyped_storage().data_ptr(): p for p in real.parameters() if not p.is_meta}
    assert all(
        f"{name}.weight" not in dict(real.model.named_parameters()) or p.is_meta
        for name in model.weights
        for p in [real.floats[name]]
    )
    assert sum(p.nbytes for p in held.values()) < sum(p.nbytes for p in model.parameters())


def test_the_simulated_model_comes_back_bit_for_bit() -> None:
    model, (args, _) = simulated("residual", 3)
    back = RealModel(model).simulated()
    assert back.sites == model.sites and back.ranges == model.ranges
    assert all(torch.equal(back.weights[n].codes, w.codes) for n, w in model.weights.items())
    with torch.no_grad():
        assert torch.equal(back(*args), model(*args))


def test_a_layer_without_a_kernel_says_why(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = simulated("one layer on two inputs")
    with caplog.at_level(logging.INFO, logger="quantkit"):
        real = RealModel(model)
    assert isinstance(real.layers["layer"], PackedLayer)
    assert "Layer 'layer' runs on dequantized weights: its input has no single quantizer" in caplog.text


def test_attributes_go_through_to_the_model() -> None:
    real = QuantizedModel.of(RealModel(simulated("residual")[0]))
    assert torch.equal(real.offset, torch.full((4,), 0.5))
    assert not real.training
    with pytest.raises(AttributeError):
        _ = real.nothing


def test_a_real_model_can_be_copied() -> None:
    model, (args, _) = simulated("residual", 4)
    real = RealModel(model)
    assert torch.equal(copy.deepcopy(real)(*args), real(*args))
