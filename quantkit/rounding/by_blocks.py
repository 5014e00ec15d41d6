"""Rounding in sequence, a block at a time: every layer on the inputs it really gets, without running what comes before
the block again. Held in memory: the value that enters the block, for all samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quantkit.program.intercept import read_place
from quantkit.program.layers import LayerCall
from quantkit.program.program import Step
from quantkit.program.segments import Segment
from quantkit.progress import track
from quantkit.ranges.statistics import accumulate
from quantkit.rounding.layer_inputs import input_columns
from quantkit.rounding.moments import Moments
from quantkit.rounding.request import RoundingRequest
from quantkit.simulation.playback import SimulatedProgram, Values, copied_state, float_program, in_chunks, play


@dataclass
class _Walk:
    """What enters block number ``at`` in the quantized network and, where there is one, in the float one."""

    runner: SimulatedProgram
    floats: SimulatedProgram | None
    blocks: Sequence[Segment]
    ours: Values
    theirs: Values
    at: int = 0

    def moments(self, name: str, block: int) -> Moments:
        """The moments of a layer's inputs, in this block or a later one."""
        for passed in self.blocks[self.at : block]:
            self.ours = play(self.runner, self.ours, passed)
            self.theirs = self.theirs if self.floats is None else play(self.floats, self.theirs, passed)
        self.at = block
        floats = None if self.floats is None else (self.floats, self.theirs)
        return moments(self.runner, self.blocks[block], name, self.ours, floats)


def round_by_blocks(
    runner: SimulatedProgram, blocks: Sequence[Segment], inputs: Values, request: RoundingRequest
) -> dict[str, str]:
    """``round_in_sequence`` for a model that its program stands for; returns how each layer was rounded. The model's
    weights are still float when it starts.
    """
    simulated, program, how = runner.model, runner.program, {}
    floats = None
    if request.method.cross:
        floats = float_program(simulated.model, program, copied_state(program, simulated.model))
    walk = _Walk(runner, floats, blocks, inputs, inputs)
    place = {name: i for i, block in enumerate(blocks) for name in block.layers}
    outside = [name for name in request.formats if name not in place]  # they do not look at inputs
    names = [*outside, *(name for name in place if name in request.formats)]
    for name in track(names, "quantizing layers", enabled=request.progress):
        seen = partial(walk.moments, name, place.get(name, 0))
        weight, how[name] = request.rounded(simulated.floats, name, seen)
        simulated.set_weight(name, weight)
    return how


@torch.no_grad()
def moments(
    runner: SimulatedProgram,
    block: Segment,
    name: str,
    values: Values,
    floats: tuple[SimulatedProgram, Values] | None = None,
) -> Moments:
    """The moments of a layer's inputs, given the values that enter its block, in ``floats`` those of the float
    network.
    """
    program = runner.program
    sums: dict[str, Tensor] = {}
    draws, same_draws = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    calls = {call.key: call for call in program.calls[name]}
    for i in range(block.start, block.stop):
        step = program.steps[i]
        if step.key not in calls:
            continue
        read = _Read(step, calls[step.key], block.until(i, step.inputs[0]), program.kinds[name])
        theirs = values if floats is None else floats[1]
        for (part, _), (other, _) in zip(in_chunks(program, values), in_chunks(program, theirs), strict=True):
            columns = read.columns(runner, part, draws)
            accumulate(sums, "hessian", columns)
            if floats is not None:
                accumulate(sums, "cross", columns, read.columns(floats[0], other, same_draws))
    return Moments(sums["hessian"], sums.get("cross"))


@dataclass(frozen=True)
class _Read:
    """A layer's call, and the part of its block before it."""

    step: Step
    call: LayerCall
    before: Segment
    kind: str

    def columns(self, runner: SimulatedProgram, part: Values, draws: torch.Generator) -> Tensor:
        """What the call reads, as its site leaves it, given the values that enter the block."""
        first, shapes = self.step.inputs[0], runner.part(self.before, part).shapes
        read = dict(zip(self.step.inputs, runner.inside(part, self.before, self.step.inputs), strict=True))
        read[first] = runner.quantize(read_place(self.step.key), read[first])
        return input_columns(self.kind, *self.step.called(read, shapes), draws, self.call.source)
