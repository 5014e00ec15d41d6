"""Rounding and learning stopped at any moment and started again: the same bits, and hardly anything done twice."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantkit import Result
from quantkit.reconstruction.learning import Schedule
from quantkit.store import Artefacts
from quantkit.targets import Target
from tests.program.models import randn
from tests.stages.networks import images, small
from tests.stages.processes import Run, forking
from tests.stages.schedules import all_of, apply_with, quantize_with
from tests.stages.test_reconstruct import SMALL, digits, layers
from tests.stages.test_workdir import edited, nudged

LAYERS, BLOCKS = 9, 2  # of the network of the quickstart; its last block is learned with the network as a whole
READS = 1  # that may get a ratio, of the network of the quickstart and of the small one: what the last layer reads

# Writes a line before every layer is rounded and every piece is learned, and kills itself at line number FATAL.
SOURCE = """
import os, signal, sys

import torch

from quantkit.cli import main
from quantkit import api
from quantkit.reconstruction import blocks as reconstruction
from quantkit.rounding import request
from quantkit.recipe import run as recipe_run
from quantkit.reconstruction.learning import Schedule
from tests.stages.schedules import all_of

torch.set_num_threads(1)
short, options = all_of(Schedule(steps=12, batch=8)), api.ApplyOptions
api.ApplyOptions = lambda *given: options(*given, learning=short)
note, learn = request.rounding_note, reconstruction.learn
log, fatal, count = None, 0, 0


def event(work):
    global count
    count += 1
    print(work, file=log, flush=True)
    if count == fatal:
        os.kill(os.getpid(), signal.SIGKILL)


def logged_note(layer, *rest):
    event(f"rounding {layer}")
    return note(layer, *rest)


def logged_learning(moved, loss, held_back, *rest):
    def first_loss(indices, seen=[]):
        if not seen:
            event(f"learning {rest[2]}")
        seen.append(1)
        return loss(indices)

    return learn(moved, first_loss, held_back, *rest)


request.rounding_note, reconstruction.learn = logged_note, logged_learning
recipe_run.export_and_measure = lambda *arguments: sys.exit(0)  # slow, and nothing in it resumes


def run(path, deadly, *arguments):
    global log, fatal
    log, fatal = open(path, "a"), deadly
    return main(["run", "recipes/quickstart.yaml", "--quiet", *arguments])
"""


def logged(run: Run, log: Path, output: Path, fatal: int = 0) -> tuple[int, list[str]]:
    """Exit status of a run, and the lines it wrote."""
    before = log.read_text().splitlines() if log.exists() else []
    settings = {"schemes": "[w2a8,w4a8]", "samples": 40, "reconstruction": "block", "output": output}
    status = run(str(log), fatal, *(f"--set={key}={value}" for key, value in settings.items()))
    return status, log.read_text().splitlines()[len(before) :]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with forking(SOURCE) as run:
        yield run


def test_a_recipe_killed_while_rounding_and_while_learning_leaves_the_same_files(run: Run, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    status, every = logged(run, tmp_path / "whole.log", whole)
    assert status == 0 and len(every) == len(set(every)) == LAYERS + BLOCKS + 1
    (killed / "work").mkdir(parents=True)
    for profile in (whole / "work").glob("profile-*"):
        profile.rename(killed / "work" / profile.name)
    done: list[str] = []
    for fatal in (4, 7, 2):
        status, lines = logged(run, tmp_path / "killed.log", killed, fatal)
        assert status == -signal.SIGKILL
        assert len(set(lines) & set(done)) <= 1
        done += lines
    assert done[-1].startswith("learning block of") and not (killed / "plan.json").exists()
    status, lines = logged(run, tmp_path / "killed.log", killed)
    assert status == 0 and len(set(lines) & set(done)) <= 1
    assert set(done + lines) == set(every)
    for name in ("weights.safetensors", "plan.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


class Killed(Exception):
    """Stands for the signal, inside one process."""


SHORT = all_of(Schedule(steps=10, batch=8))
apply, quantize = partial(apply_with, SHORT), partial(quantize_with, SHORT)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The pieces that were done, as they come."""
    original, found = Artefacts.keep, []

    def keep(self: Artefacts, name: str, *rest: Any) -> None:
        original(self, name, *rest)
        if self.folder is not None:
            found.append(name)

    monkeypatch.setattr(Artefacts, "keep", keep)
    yield found


def bits(result: Result) -> dict[str, Tensor]:
    """Everything that makes a quantized model."""
    found = dict(result.quantized.model.state_dict())
    for name, weight in result.quantized.weights.items():
        found |= {f"{name} codes": weight.codes, f"{name} scales": weight.scale}
    return found


def same(one: Result, other: Result) -> bool:
    ours, theirs = bits(one), bits(other)
    tensors = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    notes = [{key: note for key, note in result.notes.items() if key != "notices"} for result in (one, other)]
    return tensors and one.quantized.ranges == other.quantized.ranges and notes[0] == notes[1]


PLAN = dict(zip(SMALL, ("w4a8", "w2a4", "w3a8", "w8a8"), strict=True))
DEEP = dict.fromkeys(layers(), "w3a8") | {"block1.conv1": "w2a4", "linear": "w8a8"}


def with_norms() -> nn.Module:
    """Two norms, each read by one layer."""
    torch.manual_seed(0)
    parts = [nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 3)]
    with torch.no_grad():
        parts[1].weight.mul_(torch.linspace(0.1, 4, 6))
    return nn.Sequential(*parts).eval()


NORMS: dict[str, Any] = {
    "model": with_norms(),
    "plan": dict.fromkeys(("0", "2", "5"), "w4a4"),
    "calibration": randn(64, 4, 6),
    "correction": None,
}
WAYS: dict[str, tuple[dict[str, Any], int]] = {
    "network": ({"reconstruction": "network"}, READS + 5),
    "block by block": (
        {"reconstruction": "block", "rounding": "gptaq", "model": digits()[0], "plan": DEEP},
        READS + LAYERS + BLOCKS + 1,
    ),
    "AdaQuant": ({"reconstruction": "adaquant", "correction": None}, READS + 8),
    "AdaQuant in parallel": ({"reconstruction": "adaquant-parallel", "rounding": "nearest"}, READS + 11),
    "corrections": ({"reconstruction": "none"}, READS + 7),
    "norms rewritten": ({"reconstruction": "none", "reparameterization": "clip", **NORMS}, 5),
}


@pytest.mark.parametrize(("how", "pieces"), WAYS.values(), ids=list(WAYS))
def test_stopped_after_every_piece_it_ends_with_the_same_bits(
    how: dict[str, Any], pieces: int, kept: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = digits()[1][:64] if "block" in how.values() else images(64)
    usual: dict[str, Any] = {"model": small(), "plan": PLAN, "calibration": seen, "progress": False} | how
    whole = apply(**usual)
    assert not kept
    recording = Artefacts.keep

    def keep(self: Artefacts, *rest: Any) -> None:
        recording(self, *rest)
        raise Killed

    monkeypatch.setattr(Artefacts, "keep", keep)
    for count in range(1, pieces + 1):
        with pytest.raises(Killed):
            apply(**usual, workdir=tmp_path)
        assert len(kept) == len(set(kept)) == count
    again = apply(**usual, workdir=tmp_path)
    assert len(kept) == pieces
    assert same(again, whole)


def test_a_model_that_cannot_be_put_on_tape_resumes_too(kept: list[str], tmp_path: Path) -> None:
    options: dict[str, Any] = {"calibration": [images(16), torch.randn(16, 2, 8, 8)], "progress": False}
    whole = apply(small(), PLAN, workdir=tmp_path, **options)
    (folder,) = tmp_path.iterdir()
    done = sorted(kept)
    kept.clear()
    for file in sorted(folder.iterdir())[:2]:
        file.unlink()
    again = apply(small(), PLAN, workdir=tmp_path, **options)
    assert same(again, whole) and again.notes["rounding"]
    assert len(done) == READS + 4 and len(kept) == 2


CHANGES: dict[str, dict[str, Any]] = {
    "weights": {"model": nudged()},
    "forward": {"model": edited()},
    "data": {"calibration": images(seed=2)},
    "samples": {"samples": 20},
    "seed": {"seed": 1},
    "plan": {"plan": PLAN | {"mix": "w4a8"}},
    "loss": {"loss": "mse"},
    "rounding": {"rounding": "nearest"},
    "ranges": {"ranges": "minmax"},
    "reconstruction": {"reconstruction": "network", "correction": None},
    "correction": {"correction": "bias"},
    "target": {"target": replace(Target.load("onnxruntime-cpu"), integer_ops=())},
}


USUAL: dict[str, Any] = {
    "model": small(), "plan": PLAN, "calibration": images(), "reconstruction": "none", "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all pieces of the usual request."""
    folder = tmp_path_factory.mktemp("usual")
    apply(**USUAL, workdir=folder)
    return folder


def test_the_same_request_finds_all_its_pieces(usual: Path, kept: list[str]) -> None:
    apply(**USUAL, workdir=usual)
    assert not kept


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_pieces_of_another_request_are_not_used(change: dict, usual: Path, kept: list[str], tmp_path: Path) -> None:
    folder = shutil.copytree(usual, tmp_path / "work")
    changed = apply(**(USUAL | change), workdir=folder)
    assert kept and len(list(folder.iterdir())) == 2
    assert same(changed, apply(**(USUAL | change)))


def test_another_version_does_not_use_them(
    usual: Path, kept: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(usual, tmp_path / "work")
    (pieces,) = folder.iterdir()
    before = {piece.name for piece in pieces.iterdir()}
    monkeypatch.setattr("quantkit.session.VERSION", "99")
    apply(**USUAL, workdir=folder)
    assert len(kept) == len(before)


def test_a_damaged_piece_is_done_again(kept: list[str], tmp_path: Path) -> None:
    options: dict[str, Any] = {"calibration": images(), "reconstruction": "block", "progress": False}
    whole = apply(small(), PLAN, workdir=tmp_path, **options)
    (folder,) = tmp_path.iterdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        content = file.read_bytes()
        file.write_bytes([b"", content[: len(content) // 2], content[:-1], content][number % 4])
    assert same(apply(small(), PLAN, workdir=tmp_path, **options), whole)


def test_in_place_and_with_quantize(kept: list[str], tmp_path: Path) -> None:
    options: dict[str, Any] = {"schemes": ["w3a8", "w5a8"], "reconstruction": "block", "progress": False}
    whole = quantize(small(), "4 bits", images(), workdir=tmp_path, **options)
    kept.clear()
    model = small()
    again = quantize(model, "4 bits", images(), workdir=tmp_path, inplace=True, **options)
    assert again.quantized.model is model and same(again, whole)
    assert not kept
