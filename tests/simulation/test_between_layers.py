"""A replay that halts before every layer, where the layer's weight is changed, ends where the changed network does."""

from __future__ import annotations

import pytest
import torch

from quantkit.formats import WeightFormat
from quantkit.program.inputs import Batch
from quantkit.program.program import Program
from quantkit.program.segments import Segment, between_layers, whole
from quantkit.rounding.weights import quantize_weight
from quantkit.simulation import playback
from quantkit.simulation.model import SimulatedModel
from quantkit.simulation.playback import SimulatedProgram, in_chunks, move
from quantkit.transforms.prepare import Prepared
from tests.program.architectures import ARCHITECTURES
from tests.program.replays import program_of
from tests.program.test_ownership import prepared
from tests.program.test_replay_zoo import FIXED, WHOLE_BATCHES

ROUNDED = WeightFormat("3")
NAMES = [name for name in FIXED if name not in WHOLE_BATCHES]


def recorded(name: str) -> tuple[Prepared, Program, Batch]:
    """A prepared network, its program, and five samples."""
    entry = ARCHITECTURES[name]
    ready = prepared(entry)
    program = program_of(ready.model, entry.batch(2), entry.batch(5, None, 7))
    assert program is not None
    return ready, program, entry.batch(5, None, 7)


def require_nothing_before(program: Program, segments: list[Segment]) -> None:
    """Every layer in one segment, none of whose weights is read before it."""
    position = {step.key: i for i, step in enumerate(program.steps)}
    for segment in segments:
        for name in segment.layers:
            assert all(position[call.key] >= segment.start for call in program.calls[name])
            assert program.first_use(program.weights[name]) >= segment.start


@pytest.mark.parametrize("name", NAMES)
def test_ends_where_the_changed_network_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(playback, "CHUNK", 2)
    ready, program, batch = recorded(name)
    segments = between_layers(program, ready.quantizable)
    assert sorted(n for s in segments for n in s.layers) == sorted(set(ready.quantizable) & program.calls.keys())
    require_nothing_before(program, segments)

    simulated = SimulatedModel(ready.model, (), {}, {}, ready.weights, ready.program.updated)
    runner = SimulatedProgram(simulated, program)
    inputs = program.entering(ready.model, batch)
    parts = [part for part, _ in in_chunks(program, inputs)]
    for segment in segments:
        for layer in segment.layers:
            weight = ready.weights[layer]
            simulated.set_weight(layer, quantize_weight(weight, [ROUNDED]).weights[ROUNDED])
        move(runner, parts, segment)
    axis = program.rows.get(program.output, 0)
    found = torch.cat([part[program.output] for part in parts], axis)
    with torch.no_grad():
        (wanted,) = runner.inside(inputs, whole(program), [program.output])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
