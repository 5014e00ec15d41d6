"""A saved result comes back bit for bit, and damaged or foreign files are refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import quantkit
from quantkit.errors import CorruptFile, InvalidRequest
from quantkit.plan import Plan
from quantkit.program.inputs import Batch
from quantkit.simulation.model import SimulatedModel
from quantkit.stages.save_load import PLAN_FILE, WEIGHTS_FILE, load_result, save_result
from tests.backends.helpers import prepared, simulate
from tests.backends.models import ConvTwice, Residual

PLAN = Plan.of({"conv1": "w3a8", "down": "w2a8"})


@pytest.fixture(scope="module")
def batch() -> Batch:
    return (torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(3)),), {}


@pytest.fixture(scope="module")
def simulated(batch: Batch) -> SimulatedModel:
    torch.manual_seed(0)
    return simulate(prepared(Residual().eval(), batch), batch, lambda position: 2 + position)


@pytest.fixture
def folder(simulated: SimulatedModel, tmp_path: Path) -> Path:
    return save_result(simulated, PLAN, [("stem.0", "stem.1")], tmp_path / "out")


def test_round_trip_is_bit_identical(folder: Path, simulated: SimulatedModel, batch: Batch) -> None:
    torch.manual_seed(99)
    model = Residual()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded, plan, folds, _ = load_result(folder, model)
    assert plan == PLAN
    assert folds == (("stem.0", "stem.1"),)
    assert loaded.sites == simulated.sites
    assert loaded.ranges == simulated.ranges
    with torch.no_grad():
        assert torch.equal(loaded(*batch[0]), simulated(*batch[0]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training


def test_saving_again_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    loaded, plan, folds, _ = load_result(folder, Residual())
    save_result(loaded, plan, folds, tmp_path / "again")
    for name in (PLAN_FILE, WEIGHTS_FILE):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_codes_are_packed(folder: Path, simulated: SimulatedModel) -> None:
    assert (folder / WEIGHTS_FILE).stat().st_size < sum(p.numel() for p in simulated.model.parameters()) * 4 / 2 + 6000


@pytest.mark.parametrize(
    "damage", [lambda d: d[: len(d) // 2], lambda d: d[:-3] + b"xyz", lambda d: b"", lambda d: d[8:]]
)
def test_damaged_weights(folder: Path, damage) -> None:
    path = folder / WEIGHTS_FILE
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CorruptFile, match=r"weights\.safetensors' is damaged, cut off or not written by quantkit"):
        load_result(folder, Residual())


def test_missing_weights(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(InvalidRequest, match="Cannot read the weights"):
        load_result(folder, Residual())


def test_damaged_plan(folder: Path) -> None:
    (folder / PLAN_FILE).write_text((folder / PLAN_FILE).read_text()[:40])
    with pytest.raises(CorruptFile, match="not valid JSON"):
        load_result(folder, Residual())


def test_edited_plan(folder: Path) -> None:
    data = json.loads((folder / PLAN_FILE).read_text())
    data["schemes"]["conv1"] = "w8a8"
    (folder / PLAN_FILE).write_text(json.dumps(data))
    with pytest.raises(InvalidRequest, match="was changed after the weights beside it were made"):
        load_result(folder, Residual())


def test_another_architecture(folder: Path) -> None:
    with pytest.raises(InvalidRequest, match="not of the saved architecture"):
        load_result(folder, ConvTwice())


def test_another_width(folder: Path) -> None:
    model = Residual()
    model.conv1 = nn.Conv2d(8, 8, 5, padding=2)
    with pytest.raises(InvalidRequest, match=r"Layer 'conv1' has a weight of shape \(8, 8, 5, 5\).*\(8, 8, 3, 3\) in"):
        load_result(folder, model)


def test_another_parameter(folder: Path) -> None:
    model = Residual()
    model.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(InvalidRequest, match="Only the model has 'extra'"):
        load_result(folder, model)


def test_a_model_without_memory_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    quantkit.quantize(model, "w8a8", torch.randn(16, 8), progress=False).save(tmp_path)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    with pytest.raises(InvalidRequest, match=r"no memory to load into: 0\.weight, 0\.bias.*to_empty"):
        quantkit.load(tmp_path, empty)
    loaded = quantkit.load(tmp_path, empty.to_empty(device="cpu"))
    assert torch.isfinite(loaded.model(torch.randn(2, 8))).all()
