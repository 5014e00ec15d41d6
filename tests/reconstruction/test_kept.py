"""What is kept of a model is the same numbers when it is read back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantkit.formats import Scheme
from quantkit.numbers.uniform import QuantizedWeight, SiteRange
from quantkit.reconstruction.snapshot import Cache, Learned, Snapshot
from quantkit.rounding.weights import quantize_weight
from quantkit.simulation.model import SimulatedModel
from quantkit.store import Artefacts
from tests.program.models import randn

FORMATS = ["w3", "w8", "w4g4", "w4g4z", "w2z"]


def model_of(format: str, seed: int = 0, bias: bool = True) -> SimulatedModel:
    torch.manual_seed(seed)
    layer = torch.nn.Linear(8, 6, bias=bias)
    wanted = Scheme.parse(format).weight
    assert wanted is not None
    codes = quantize_weight(layer.weight, [wanted]).weights[wanted]
    return SimulatedModel(torch.nn.Sequential(layer), (), {"0": codes}, {"input": SiteRange(0.1 + seed, 3, 4)})


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_learned_piece_is_put_back_with_its_figures_and_draws(format: str, bias: bool, tmp_path: Path) -> None:
    finished, draws = Cache(Artefacts(tmp_path)), torch.Generator().manual_seed(5)
    learned, other = model_of(format, 1, bias), model_of(format, 2, bias)
    found = finished.learned(
        "piece", learned, ["0"], lambda: Learned(0.1, float(torch.rand(1, generator=draws))), draws
    )
    again = torch.Generator()
    repeated = finished.learned("piece", other, ["0"], lambda: pytest.fail("it was finished"), again)
    assert repeated == found
    assert torch.equal(torch.rand(3, generator=again), torch.rand(3, generator=draws))
    assert other.ranges == learned.ranges
    x = randn(5, 8)
    assert torch.equal(other(x), learned(x))


@pytest.mark.parametrize("format", FORMATS)
def test_a_layer_is_rounded_once_for_each_format(format: str, tmp_path: Path) -> None:
    finished, weight, done = Cache(Artefacts(tmp_path)), model_of(format).weights["0"], []

    def compute() -> tuple[QuantizedWeight, str]:
        done.append(1)
        return weight, "gptq, damping 0.01"

    for _ in range(2):
        codes, note = finished.rounding("0", weight.format, compute)
        assert torch.equal(codes.dequantize(), weight.dequantize()) and note == "gptq, damping 0.01"
    assert len(done) == 1
    other = Scheme.parse("w5").weight
    assert other is not None
    finished.rounding("0", other, compute)
    finished.rounding("1", weight.format, compute)
    assert len(done) == 3


def test_without_a_folder_nothing_is_kept() -> None:
    finished, model = Cache(), model_of("w3")
    weight, count = model.weights["0"], []
    for _ in range(2):
        finished.rounding("0", weight.format, lambda: count.append(1) or (weight, "nearest"))
        finished.learned("piece", model, ["0"], lambda: count.append(1) or Learned(1.0, 1.0))
    assert len(count) == 4


def test_a_part_of_a_model_is_kept_alone() -> None:
    model = model_of("w3")
    assert Snapshot.of(model, []).weights == {} and Snapshot.of(model).weights.keys() == {"0"}
