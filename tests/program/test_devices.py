"""A model on an accelerator with codes, draws and spilled values on the CPU: in fake tensors, which need no
accelerator and refuse to mix devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from quantkit.formats import WeightFormat
from quantkit.reconstruction.adaquant import JointWeight
from quantkit.reconstruction.block_error import ElementError, PositionError
from quantkit.reconstruction.learned import LearnedWeight
from quantkit.rounding.weights import quantize_weight
from quantkit.simulation.playback import mixed


@pytest.fixture(autouse=True)
def fake() -> Iterator[None]:
    with FakeTensorMode(), torch.no_grad():  # torch built without CUDA has no backward for its tensors
        yield


def away(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.float32, device="cuda")


@pytest.mark.parametrize("rounding", ["nearest", "hqq"])
def test_codes_of_a_weight_elsewhere_are_on_the_cpu(rounding: str) -> None:
    format = WeightFormat("4", zero_point=True)  # whose search asks for no values: there are none
    found = quantize_weight(away(4, 8), [format], rounding=rounding).weights[format]
    assert {found.codes.device.type, found.scale.device.type} == {"cpu"}


@pytest.mark.parametrize("kind", [LearnedWeight, JointWeight])
def test_weights_are_learned_where_they_are(kind: type[LearnedWeight]) -> None:
    format = WeightFormat("4", zero_point=True)
    weight = away(4, 8)
    learned = kind(weight, quantize_weight(weight, [format], rounding="nearest").weights[format], away(4), away(4))
    assert (away(2, 8) @ learned.value().T + learned.bias()).device.type == "cuda"
    found = learned.found()
    assert found.zero_point is not None
    assert {x.device.type for x in (found.codes, found.scale, found.zero_point)} == {"cpu"}


def test_draws_of_the_cpu_mix_values_elsewhere() -> None:
    assert mixed(away(2, 3), away(2, 3), torch.Generator().manual_seed(0)).device.type == "cuda"


@pytest.mark.parametrize("kind", ["elements", "positions"])
def test_spilled_values_meet_a_block_elsewhere(kind: str) -> None:
    program: Any = SimpleNamespace(rows={0: 0})
    error = ElementError(program, 0, away(3)) if kind == "elements" else PositionError(0, None)
    assert error(away(2, 3), torch.empty(2, 3), {}).device.type == "cuda"
