"""Layers that "w8a8" leaves float because they make most of the damage, and those that it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import quantkit
from quantkit.stages import float_activations
from quantkit.stages.float_activations import LeftFloat, fewest_layers
from quantkit.stages.result import Result

GAINS = torch.logspace(0, 1.5, 8)  # of channels that share a scale: the smallest have a code for thirty
WIDE_GAINS = torch.logspace(0, 4, 8)


def rows(count: int, seed: int) -> Tensor:
    return torch.randn(count, 4, 12, generator=torch.Generator().manual_seed(seed))


class Uneven(nn.Module):
    """Convolutions whose channels between them differ by orders of magnitude, and count alike; after them a third,
    which has most of the work.
    """

    def __init__(self, gains: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three = nn.Conv1d(4, 8, 3), nn.Conv1d(8, 8, 3), nn.Conv1d(8, 64, 3)
        with torch.no_grad():
            self.one.weight.mul_(gains[:, None, None])
            self.one.bias.mul_(gains)
            self.two.weight.div_(gains[:, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.two(self.one(x)).relu())


class Recurrent(nn.Module):
    """An LSTM whose inputs differ by orders of magnitude, the least of them under the largest weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.head = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 3)
        with torch.no_grad():
            self.lstm.weight_ih_l0.div_(WIDE_GAINS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def quantized(model: nn.Module, x: Tensor, **options: object) -> Result:
    return quantkit.quantize(model.eval(), "w8a8", [x], progress=False, loss="mse", **options)


@pytest.fixture(scope="module")
def uneven() -> Result:
    return quantized(Uneven(GAINS), rows(32, 1))


@pytest.fixture(scope="module")
def asked() -> Result:
    """The same, insisted on."""
    return quantized(Uneven(GAINS), rows(32, 1), rules={"*": "w8a8"})


def test_layers_around_channels_of_very_different_size_compute_in_float(uneven: Result, asked: Result) -> None:
    schemes = {name: str(scheme) for name, scheme in uneven.plan.schemes.items()}
    assert schemes == {"one": "w8", "two": "w8", "three": "w8a8"}
    assert "float activations take the damage from" in uneven.plan.why["one"]
    assert uneven.metrics["calibration_damage"] < 0.1 * asked.metrics["calibration_damage"]


def test_codes_of_weights_stay_in_the_file(uneven: Result, asked: Result, tmp_path: Path) -> None:
    assert uneven.plan.size_bytes == asked.plan.size_bytes
    lengths = [one.export_onnx(tmp_path / f"{i}.onnx").file_bytes for i, one in enumerate((uneven, asked))]
    assert lengths[0] <= lengths[1]


def test_the_plan_is_applied_and_loaded_as_it_is(uneven: Result, tmp_path: Path) -> None:
    x = rows(8, 2)
    again = quantkit.apply(Uneven(GAINS).eval(), uneven.plan, [rows(32, 1)], progress=False, loss="mse")
    assert (again.plan.schemes, again.plan.sites) == (uneven.plan.schemes, uneven.plan.sites)
    uneven.save(tmp_path)
    loaded = quantkit.load(tmp_path, Uneven(GAINS).eval())
    torch.testing.assert_close(loaded.model(x), uneven.model(x))


def test_what_a_rule_names_stays_as_it_was_asked_for() -> None:
    found = quantized(Uneven(GAINS), rows(32, 1), rules={"one": "w8a8"})
    assert {str(scheme) for scheme in found.plan.schemes.values()} == {"w8a8"}  # "two" alone would change nothing


def test_an_even_network_keeps_all_its_codes() -> None:
    found = quantized(Uneven(torch.ones(8)), rows(32, 1))
    assert {str(scheme) for scheme in found.plan.schemes.values()} == {"w8a8"}
    assert "float" not in found.plan.sites.values()


def test_trying_changes_nothing(asked: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float_activations, "LEAST_SHARE", 1.0)  # nothing is worth it
    tried = quantized(Uneven(GAINS), rows(32, 1))
    assert tried.plan.schemes == asked.plan.schemes
    x = rows(8, 2)
    assert torch.equal(tried.model(x), asked.model(x))


def test_weights_that_are_read_in_float_anyway_are_left_float(tmp_path: Path) -> None:
    x = torch.randn(32, 5, 8, generator=torch.Generator().manual_seed(1)) * WIDE_GAINS
    model = Recurrent()
    found = quantized(model, x)
    assert str(found.plan.schemes["lstm.weight_ih_l0"]) == "float"
    assert torch.equal(found.quantized.model.lstm.weight_ih_l0, model.lstm.weight_ih_l0)
    asked = quantized(model, x, rules={"*": "w8a8"})
    assert found.plan.size_bytes == asked.plan.size_bytes + 24 * 8 * 3 - 24 * 4  # 32 bits for 8, and no scales
    assert found.metrics["calibration_damage"] < 0.5 * asked.metrics["calibration_damage"]
    found.export_onnx(tmp_path / "recurrent.onnx")


def test_networks_of_many_layers_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float_activations, "TRIALS_AND_SAMPLES", 4 * 32 - 1)
    found = quantized(Uneven(GAINS), rows(32, 1))
    assert {str(scheme) for scheme in found.plan.schemes.values()} == {"w8a8"}


def test_layers_in_float_and_on_integers_run_together_outside_the_simulation(uneven: Result) -> None:
    x = rows(8, 2)
    torch.testing.assert_close(uneven.to_real().model(x), uneven.model(x), rtol=0, atol=1e-4)


def test_most_of_a_network_is_not_slowed_down_for_a_part_of_the_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float_activations, "LEAST_SHARE", 0.0)  # whatever lowers it by more than its operations
    found = quantized(Uneven(torch.ones(8)), rows(32, 1))
    assert {str(scheme) for scheme in found.plan.schemes.values()} == {"w8a8"}


def test_a_second_layer_is_not_left_float_for_next_to_nothing() -> None:
    one, both = LeftFloat(("one",), (), 1.0, 0.11), LeftFloat(("one", "two"), (), 1.0, 0.1)
    assert fewest_layers([both, one]) == one
    much = LeftFloat(("one", "two"), (), 1.0, 0.01)
    assert fewest_layers([much, one]) == much
