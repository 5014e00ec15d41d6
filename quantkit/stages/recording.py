"""A model's program with all calibration samples, those of one size as one batch: what rounding and learning replay
from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.program.input_shapes import MOST_FORMS, form_of
from quantkit.program.inputs import Batch, batch_size, first_samples, picked_samples, stacked
from quantkit.program.program import Program
from quantkit.program.replayable import replayable
from quantkit.program.segments import Segment, blocks_of
from quantkit.stages.footprint import compared_bytes
from quantkit.transforms.prepare import Prepared

TRIED = 8  # samples from either end that a replay must agree with the model on, beside those it was recorded on
TRIED_BYTES = 1 << 28  # and no more than these take, two at least
FEW = 2  # samples of each combination of sizes beyond the first few, of which there may be hundreds


@dataclass(frozen=True)
class Replay:
    """The program that stands for a model, and the calibration samples: of each size those of all batches as one."""

    program: Program
    samples: tuple[Batch, ...]

    @property
    def count(self) -> int:
        """How many samples there are."""
        return sum(map(batch_size, self.samples))


@dataclass(frozen=True)
class Recording(Replay):
    """A replay with the blocks that the program is cut into."""

    blocks: list[Segment]


def replay_of(ready: Prepared, batches: Sequence[Batch]) -> Replay | str:
    """The replay of a model, or why there is none."""
    if not batches or ready.example is None:
        return "there is no calibration data"
    samples = samples_by_size(batches)
    if samples is None:
        return "its inputs cannot be put into batches of one size"
    if len(samples) > 1:
        program = program_of_sizes(ready, batches)
    else:
        order = torch.arange(batch_size(samples[0]), device="cpu")
        tried = max(FEW, min(TRIED, TRIED_BYTES // max(1, compared_bytes(ready.program, 1))))
        others = [some_samples(samples[0], order[:tried]), some_samples(samples[0], order.flip(0)[:tried])]
        program = replayable(ready.program, ready.model, ready.example, others)
    if program is None or program.rows.get(program.output) != 0:
        return "what it computes depends on more than its inputs' values and batch size"
    return Replay(program, samples)


def samples_by_size(batches: Sequence[Batch]) -> tuple[Batch, ...] | None:
    """The samples of each size as one batch, or None where arguments are no rows of samples."""
    forms: dict[str, list[Batch]] = {}
    for batch in batches:
        forms.setdefault(form_of(batch), []).append(batch)
    samples = [one for form in forms.values() if (one := stacked(form)) is not None]
    return tuple(samples) if len(samples) == len(forms) else None


def program_of_sizes(ready: Prepared, batches: Sequence[Batch]) -> Program | None:
    """The program that stands for a model on batches of several sizes; None where there is none, or no data. It was
    tried on every combination of sizes among them, the number of samples apart.
    """
    if not batches or ready.example is None:
        return None
    forms: dict[str, Batch] = {}
    for batch in batches:
        forms.setdefault(form_of(batch), batch)
    counts = (TRIED if i < MOST_FORMS else FEW for i in range(len(forms)))
    others = [first_samples(batch, count) for batch, count in zip(forms.values(), counts, strict=True)]
    program = replayable(ready.program, ready.model, ready.example, others)
    return None if program is None or program.rows.get(program.output) != 0 else program


def recording_of(ready: Prepared, replay: Replay) -> Recording:
    """A replay cut into blocks by the layers to quantize and their sites."""
    blocks = blocks_of(replay.program, ready.quantizable, {site.place for site in ready.sites})
    return Recording(replay.program, replay.samples, blocks)


def some_samples(batch: Batch, indices: Tensor) -> Batch:
    """Samples of a batch, again from the first where indices pass the last."""
    return picked_samples(batch, indices % batch_size(batch))
