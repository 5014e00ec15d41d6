"""`quantkit profile` killed at random moments and run again: the same profile, and hardly anything done twice."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import quantkit
from quantkit.plan import Profile
from quantkit.sensitivity.measure import Subject
from quantkit.store import Artefacts
from tests.recipe.tiny import rewritten, write_tiny
from tests.stages.networks import images, small
from tests.stages.processes import Run, forking

# Writes a line for every layer rounded and every format measured, and kills itself at line number FATAL.
SOURCE = """
import os, signal, sys

import torch

from quantkit.cli import main
from quantkit.sensitivity import perturbations
from quantkit.sensitivity.measure import Subject

torch.set_num_threads(1)
outputs, note = Subject.outputs, perturbations.rounding_note
log, fatal, count = None, 0, 0


def event(*words):
    global count
    count += 1
    print(*words, file=log, flush=True)
    if count == fatal:
        os.kill(os.getpid(), signal.SIGKILL)


def logged_outputs(self, changes=()):
    if len(changes) == 1:
        event("measured", changes[0].owner, changes[0].format)
    elif changes:
        event("measured", "plan:" + "/".join(one.format for one in changes))
    return outputs(self, changes)


def logged_note(layer, *rest):
    event("rounded", layer)
    return note(layer, *rest)


Subject.outputs, perturbations.rounding_note = logged_outputs, logged_note


def run(recipe, path, deadly):
    global log, fatal
    log, fatal = open(path, "a"), deadly
    return main(["profile", recipe, "--quiet"])
"""


def logged(run: Run, recipe: Path, log: Path, fatal: int = 0) -> tuple[int, list[str]]:
    """Exit status of a run, and the lines it wrote."""
    before = log.read_text().splitlines() if log.exists() else []
    status = run(str(recipe), str(log), fatal)
    return status, log.read_text().splitlines()[len(before) :]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with forking(SOURCE) as run:
        yield run


def layers_of(lines: Sequence[str]) -> set[tuple[str, ...]]:
    """What was worked on: layers and sites apart (one may be named as the other), and whole plans."""
    return {_place(line) for line in lines}


def _place(line: str) -> tuple[str, ...]:
    work, owner, *format = line.split()
    return (work, owner, *(one[0] for one in format))


def test_killed_three_times_it_ends_with_the_same_profile_and_repeats_at_most_one_layer(
    run: Run, tmp_path: Path
) -> None:
    path = write_tiny(tmp_path)
    whole = rewritten(path, output=str(tmp_path / "whole"), schemes=["w3a8", "w5a8", "w8a8"]).rename(path.parent / "w")
    status, every = logged(run, whole, tmp_path / "whole.log")
    assert status == 0
    assert len(every) == len(set(every)), "an uninterrupted run does nothing twice"
    killed = rewritten(write_tiny(tmp_path / "again"), output=str(tmp_path / "killed"))
    draw, done = random.Random(0), []
    for _ in range(3):
        status, lines = logged(run, killed, tmp_path / "killed.log", fatal=draw.randint(2, len(every) // 3))
        assert status == -signal.SIGKILL
        assert len(layers_of(lines) & layers_of(done)) <= 1
        done += lines
    status, lines = logged(run, killed, tmp_path / "killed.log")
    assert status == 0
    assert len(layers_of(lines) & layers_of(done)) <= 1
    assert set(done + lines) == set(every)
    digests = [Profile.load(tmp_path / n / "profile.safetensors").digest() for n in ("whole", "killed")]
    assert digests[0] == digests[1]
    assert [p.name.split("-")[0] for p in (tmp_path / "killed" / "work").iterdir()] == ["profile"]


class Killed(Exception):
    """Stands for the signal, inside one process."""


@pytest.mark.parametrize("sensitivity", ["gram", "kl", "noise", "pairwise"])
def test_estimators_that_go_from_layer_to_layer_resume(sensitivity: str, tmp_path: Path, monkeypatch) -> None:
    options = {"schemes": ["w3a8", "w8a8"], "progress": False, "sensitivity": sensitivity}
    whole = quantkit.profile(small(), images(), **options)
    original, kept = Artefacts.keep, []

    def keep(self, name, *rest):
        original(self, name, *rest)
        kept.append(name)
        if len(kept) == 8:
            raise Killed

    monkeypatch.setattr(Artefacts, "keep", keep)
    with pytest.raises(Killed):
        quantkit.profile(small(), images(), workdir=tmp_path, **options)
    resumed = quantkit.profile(small(), images(), workdir=tmp_path, **options)
    assert len(kept) == len(set(kept)) > 8, "something was left to do, and nothing was done twice"
    assert resumed == whole


def test_a_damaged_artefact_is_measured_again(tmp_path: Path, monkeypatch) -> None:
    options = {"schemes": ["w3a8", "w8a8"], "progress": False}
    monkeypatch.setattr(Artefacts, "remove", lambda self: None)
    whole = quantkit.profile(small(), images(), workdir=tmp_path, **options)
    (profile,) = tmp_path.glob("profile-*")
    (folder,) = tmp_path.glob("layers-*")
    for number, file in enumerate(sorted(folder.iterdir())):
        content = file.read_bytes()
        file.write_bytes([b"", content[: len(content) // 2], content[:-1], content][number % 4])
    profile.unlink()
    assert quantkit.profile(small(), images(), workdir=tmp_path, **options) == whole


def test_artefacts_of_another_request_are_not_used(tmp_path: Path, monkeypatch) -> None:
    options = {"schemes": ["w3a8", "w8a8"], "progress": False}
    monkeypatch.setattr(Artefacts, "remove", lambda self: None)
    quantkit.profile(small(), images(), workdir=tmp_path, **options)
    measured = []
    original = Subject.outputs

    def outputs(self, perturbations=()):
        measured.append(len(perturbations))
        return original(self, perturbations)

    monkeypatch.setattr(Subject, "outputs", outputs)
    other = quantkit.profile(small(), images(seed=2), workdir=tmp_path, **options)
    assert measured.count(1) == len(other.entries)
    assert len([count for count in measured if count > 1]) == other.provenance["whole_plans"] > 0
    assert other == quantkit.profile(small(), images(seed=2), **options)
