"""A profile is measured once for everything it depends on, and again when any of that changes."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantkit
from quantkit.errors import InvalidRequest
from quantkit.plan import Profile
from quantkit.stages import profile as stage
from quantkit.targets import Target
from tests.stages.networks import Small, images, small

OPTIONS: dict[str, Any] = {"schemes": ["w3a8", "w8a8"], "progress": False}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Profile]:
    """The profiles that were really measured, as they come."""
    found: list[Profile] = []
    original = stage._measure

    def record(*arguments: Any) -> Profile:
        found.append(original(*arguments))
        return found[-1]

    monkeypatch.setattr(stage, "_measure", record)
    return found


def test_a_profile_is_reused(measured: list[Profile], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="quantkit"):
        first = quantkit.profile(small(), images(), workdir=tmp_path, **OPTIONS)
        second = quantkit.profile(small(), images(), workdir=tmp_path, **OPTIONS)
        made = quantkit.quantize(small(), "4 bits", images(), workdir=tmp_path, **OPTIONS)
    assert len(measured) == 1
    assert first == second == made.profile
    (file,) = tmp_path.glob("profile-*")
    assert caplog.text.count("measuring 14 formats: about 18 forwards of 24 samples, ") == 1
    assert "memory at most about " in caplog.text
    assert caplog.text.count(f"reusing the profile {file}") == 2


def test_other_budgets_solvers_and_evaluations_reuse_it(measured: list[Profile], tmp_path: Path) -> None:
    quantkit.quantize(small(), "4 bits", images(), workdir=tmp_path, **OPTIONS)
    quantkit.quantize(small(), "6 bits", images(), workdir=tmp_path, solver="greedy", **OPTIONS)
    quantkit.quantize(small(), "4 bits", images(), workdir=tmp_path, evaluate=lambda model: 1.0, **OPTIONS)
    assert len(measured) == 1


class Edited(Small):
    """The same weights and, as a class keeps its name while it is edited, the same name; another computation."""

    def forward(self, x):
        return super().forward(x) * 2.0


Edited.__qualname__ = Small.__qualname__


def edited() -> nn.Module:
    model = Edited()
    model.load_state_dict(small().state_dict())
    return model.eval()


def nudged() -> nn.Module:
    model = small()
    with torch.no_grad():
        model.head.bias[3] += 1e-3
    return model


CHANGES: dict[str, dict[str, Any]] = {
    "weights": {"model": nudged()},
    "forward": {"model": edited()},
    "data": {"calibration": images(seed=2)},
    "samples": {"samples": 7},
    "seed": {"seed": 1},
    "schemes": {"schemes": ["w3a8", "w7a8"]},
    "rules": {"rules": {"head": "w8a8"}},
    "loss": {"loss": "mse"},
    "rounding": {"rounding": "nearest"},
    "ranges": {"ranges": "minmax"},
    "target": {"target": replace(Target.load("onnxruntime-cpu"), integer_ops=())},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_anything_that_decides_measures_again(change: dict, measured: list[Profile], tmp_path: Path) -> None:
    usual = {"model": small(), "calibration": images(), "workdir": tmp_path, **OPTIONS}
    quantkit.profile(**usual)
    quantkit.profile(**(usual | change))
    assert len(measured) == 2
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", [lambda d: b"", lambda d: d[: len(d) // 2], lambda d: b"\xff" * 64])
def test_a_damaged_profile_is_measured_again(
    damage: Any, measured: list[Profile], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quantkit.profile(small(), images(), workdir=tmp_path, **OPTIONS)
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    quantkit.profile(small(), images(), workdir=tmp_path, **OPTIONS)
    assert len(measured) == 2
    assert "measuring again: " in caplog.text
    assert "is not a complete quantkit profile" in caplog.text
    assert Profile.load(file) == measured[1]


def test_a_workdir_that_cannot_be_written(measured: list[Profile], tmp_path: Path) -> None:
    """Permissions do not stop root; a file in the place of a folder stops everybody."""
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match=r"Cannot write .*Choose a folder that exists and can be written"):
        quantkit.profile(small(), images(), workdir=tmp_path / "file" / "work", **OPTIONS)
    assert measured == []
