"""What does a profile cost? Forwards and memory of ResNet20's default profile, counted and measured.

    python tools/study_profile_cost.py [--samples 256]

Five weight formats of every layer and two activation formats of every site, so many measured pairs. Forwards are
counted where the model runs, in sample sets, of replays by the share of steps they take; rounding is left out, its
time printed. Memory is the peak of the process over what it held before (Linux; glibc is told to give back what is
freed, so that only what is held counts), against 1.5 times that of one calibration forward, plus the weights, plus the
output shifts that are kept.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden_run import recipe_model
from safetensors.torch import load_file
from study_sensitivity import REPOSITORY, SOURCES

from quantkit.formats import ActivationFormat, Scheme
from quantkit.program.inputs import Batch, batch_size, split_batches
from quantkit.program.program import Program, Step
from quantkit.program.record import run_model
from quantkit.rounding.request import RoundingOptions
from quantkit.sensitivity import ESTIMATORS
from quantkit.sensitivity.inputs import mixed_pairs
from quantkit.sensitivity.measure import Subject
from quantkit.sensitivity.perturbations import site_perturbations, weight_perturbations
from quantkit.stages.recording import Replay, replay_of
from quantkit.targets import Target
from quantkit.transforms.prepare import Prepared, prepare

BITS = (2, 3, 4, 6, 8)
SITE_BITS = (4, 8)
M_MMAP_THRESHOLD = -3  # of mallopt: larger pieces are mapped, and unmapped when they are freed
LIBC = ctypes.CDLL("libc.so.6")
BATCH = 128
MB = 1e6


def peak_reset() -> int:
    """Give free memory back and forget the peak so far; returns the bytes held now."""
    LIBC.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """The most bytes held since ``peak_reset``."""
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


class Counter:
    """Counts the samples that went through a model, whole or, in replays, step by step."""

    def __init__(self, ready: Prepared, program: Program) -> None:
        self.samples = 0.0
        steps = [step for step in program.steps if not step.constant]
        self.program = replace(program, steps=tuple(self._counting(step, len(steps)) for step in steps))
        ready.model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, _: object, args: tuple, kwargs: dict) -> None:
        self.samples += batch_size((args, kwargs))

    def _counting(self, step: Step, steps: int) -> Step:
        def compute(*args: Any, **kwargs: Any) -> Any:
            self.samples += len(args[0]) / steps
            return step.func(*args, **kwargs)

        return replace(step, func=compute)


def prepared(samples: int, data: Path) -> tuple[Prepared, list[Batch]]:
    """ResNet20 and its calibration batches."""
    weights, file, array, *_ = SOURCES["resnet20"]
    recipe = recipe_model("resnet20")
    model = recipe.build()
    model.load_state_dict(load_file(data / weights))
    images = recipe.preprocess(np.load(data / file)[array])[:samples]
    batches = split_batches([((images,), {})], BATCH)
    return prepare(model, batches, Target.load("onnxruntime-cpu")), batches


def activation_formats(bits: Sequence[int]) -> list[ActivationFormat]:
    parsed = [Scheme.parse(f"a{b}").activation for b in bits]
    return [format for format in parsed if format is not None]


def one_forward(ready: Prepared, batch: Batch) -> tuple[int, int]:
    """Peak bytes of one forward, and the number of classes it gives."""
    before = peak_reset()
    with torch.no_grad():
        classes = run_model(ready.model, batch).shape[-1]
    return peak() - before, classes


def subject_of(ready: Prepared, inputs: list[Batch], program: Program) -> Subject:
    sites = {site.name: site for site in ready.sites}
    return Subject(ready.model, inputs, sites, weights=ready.weights, program=program)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=256, help="calibration images (default 256)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    LIBC.mallopt(M_MMAP_THRESHOLD, 1 << 16)
    data = Path(os.environ.get("QUANTKIT_DATA", REPOSITORY.parent / "shared" / "data"))
    ready, batches = prepared(options.samples, data)
    started = time.process_time()
    candidates = {name: [Scheme.parse(f"w{b}") for b in BITS] for name in ready.quantizable}
    changes, _ = weight_perturbations(ready, candidates, batches, RoundingOptions("gptq"), progress=True)
    rounding = time.process_time() - started
    replay = replay_of(ready, batches)
    assert isinstance(replay, Replay), replay
    counter = Counter(ready, replay.program)
    changes += site_perturbations(ready, activation_formats(SITE_BITS), batches, "mse", progress=True)
    inputs = mixed_pairs(batches, torch.Generator().manual_seed(0))
    assert inputs is not None, "images can be mixed"
    subject = subject_of(ready, inputs, counter.program)
    forward, classes = one_forward(ready, batches[0])
    counter.samples -= batch_size(batches[0])
    before, started = peak_reset(), time.process_time()
    scores = ESTIMATORS["gram"](subject, changes, True, torch.Generator().manual_seed(0))
    taken = peak() - before
    forwards = counter.samples / options.samples
    weights = sum(p.numel() * p.element_size() for p in ready.model.parameters())
    shifts = 4 * len(changes) * options.samples * classes
    allowed = 1.5 * forward + weights + shifts
    print(
        f"{len(changes)} pairs: {len(ready.quantizable)} layers x {BITS}, {len(ready.sites)} sites x {SITE_BITS} bits"
    )
    print(
        f"forwards of {options.samples} samples: {forwards:.1f}, {forwards / len(changes):.3f} per pair (1.3 allowed)"
    )
    print(f"  of these {scores.notes['whole_plans']} for whole plans; rounding, not counted: {rounding:.0f} s")
    print(f"measuring: {time.process_time() - started:.0f} s of processor time")
    print(
        f"peak memory: {taken / MB:.1f} MB; allowed {allowed / MB:.1f} MB = 1.5 x {forward / MB:.1f} MB of a forward "
        f"of {BATCH} + {weights / MB:.1f} MB of weights + {shifts / MB:.1f} MB of output shifts"
    )


if __name__ == "__main__":
    main()
