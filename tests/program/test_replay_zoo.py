"""The program of every network of the zoo, recorded on one batch, computes what the network computes at other sizes,
as a whole and segment by segment; segments do not reach across blocks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from quantkit.program.inputs import Batch
from quantkit.program.program import Part, Program
from quantkit.program.segments import Segment, blocks_of
from quantkit.program.updates import restored
from quantkit.simulation import playback
from quantkit.simulation.playback import float_program
from tests.program.architectures import ARCHITECTURES, Architecture
from tests.program.replays import program_of
from tests.program.test_architectures import BLOCK

CLOSE = 1e-5  # of the largest output
RECORDED = 2  # samples
FIXED = [name for name, entry in ARCHITECTURES.items() if not entry.control_flow]
# Statistics of a batch are in the first's outputs, and the second's inputs are not one row for each sample.
WHOLE_BATCHES = ("running_state", "embedding_bag_recommender")
WITH_BLOCKS = [name for name in FIXED if ARCHITECTURES[name].blocks]


@dataclass(frozen=True)
class Recorded:
    """A network with its program."""

    entry: Architecture
    model: nn.Module
    program: Program

    def segments(self) -> list[Segment]:
        return blocks_of(self.program, list(self.program.calls))


_recorded: dict[str, Recorded] = {}


def recorded(name: str) -> Recorded:
    """A network and its program, recorded once."""
    if name not in _recorded:
        entry = ARCHITECTURES[name]
        model = entry.build()
        program = program_of(model, entry.batch(RECORDED))
        assert program is not None
        _recorded[name] = Recorded(entry, model, program)
    return _recorded[name]


def wanted(found: Recorded, batch: Batch) -> list[Tensor]:
    """The model's own floating-point outputs."""
    with torch.no_grad(), restored(found.model):
        return found.entry.output(found.model(*batch[0], **batch[1]))


def require_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert float((one - other).abs().max()) <= CLOSE * float(other.abs().max())


def require_replay(found: Recorded, samples: int, length: int | None, seed: int) -> None:
    program, batch = found.program, found.entry.batch(samples, length, seed)
    with torch.no_grad():
        values = program.entering(found.model, batch)
        outputs = program.replay(values, program.state_of(found.model), program.outputs)
    require_same([x for x in outputs if x.is_floating_point()], wanted(found, batch))


@pytest.mark.parametrize("name", FIXED)
def test_replays_other_numbers_of_samples_and_other_lengths(name: str) -> None:
    found = recorded(name)
    for samples in (1, 3, 5, 32):
        for length in found.entry.lengths or (None,):
            require_replay(found, samples, length, seed=7)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_replays_any_size_of_any_network(data: st.DataObject) -> None:
    found = recorded(data.draw(st.sampled_from(FIXED)))
    length = data.draw(st.sampled_from(found.entry.lengths or (None,)))
    require_replay(found, data.draw(st.integers(1, 17)), length, data.draw(st.integers(0, 99)))


@pytest.mark.parametrize("name", [name for name, entry in ARCHITECTURES.items() if "values" in entry.control_flow])
def test_what_decides_by_values_has_no_program(name: str) -> None:
    entry = ARCHITECTURES[name]
    sizes = [(samples, length) for samples in (1, 3) for length in entry.lengths or (None,)]
    others = [entry.batch(*size, seed) for size in sizes for seed in (7, 8)]
    assert program_of(entry.build(), entry.batch(RECORDED), *others) is None


@pytest.mark.parametrize("name", FIXED)
def test_segments_one_after_the_other_are_the_network(name: str) -> None:
    found = recorded(name)
    program, state = found.program, found.program.state_of(found.model)
    for length in found.entry.lengths or (None,):
        with torch.no_grad():
            values = program.entering(found.model, found.entry.batch(5, length, 7))
            (whole,) = program.replay(values, state, [program.output])
            values, shapes = program.entering(found.model, found.entry.batch(5, length, 7)), {}
            for segment in found.segments():
                part = Part(segment.start, segment.stop, shapes)
                values = {number: values[number] for number in segment.entering}
                leaving = program.replay(values, state, segment.leaving, part=part)
                values = dict(zip(segment.leaving, leaving, strict=True))
        require_same([values[program.output]], [whole])


@pytest.mark.parametrize("name", [name for name in FIXED if name not in WHOLE_BATCHES])
def test_segments_are_played_on_all_samples_in_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(playback, "CHUNK", 3)
    found = recorded(name)
    program, state, batch = found.program, found.program.state_of(found.model), found.entry.batch(8, None, 7)
    runner, values = float_program(found.model, program, state), program.entering(found.model, batch)
    for segment in found.segments():
        values = playback.play(runner, {number: values[number] for number in segment.entering}, segment)
    with torch.no_grad():
        (whole,) = program.replay(program.entering(found.model, batch), state, [program.output])
    require_same([values[program.output]], [whole])


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_every_block_is_a_segment_or_several(name: str) -> None:
    found = recorded(name)
    blocks = [path for path, module in found.model.named_modules() if BLOCK.search(type(module).__name__)]
    inside = re.compile("|".join(rf"({re.escape(path)})\." for path in blocks))

    segments = found.segments()
    assert len(segments) >= found.entry.blocks
    for segment in segments:
        reached = {match.group(0) for layer in segment.layers if (match := inside.match(layer))}
        assert len(reached) <= 1, segment.layers
