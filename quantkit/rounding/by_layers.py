"""Rounding in sequence in a single replay: every layer on the inputs it really gets, and nothing is run twice. Held in
memory: what is read from a layer on, for all samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from quantkit.program.intercept import read_place
from quantkit.program.layers import LayerCall
from quantkit.program.padding import as_rows
from quantkit.program.program import Program, Step
from quantkit.program.segments import Segment, between_layers
from quantkit.progress import track
from quantkit.ranges.statistics import accumulate
from quantkit.rounding.blocks import HESSIAN_BYTES, blocks_of
from quantkit.rounding.layer_inputs import LayerInputs, layer_inputs
from quantkit.rounding.moments import Moments
from quantkit.rounding.recurrent_inputs import recurrent_inputs
from quantkit.rounding.request import RoundingRequest
from quantkit.simulation.playback import SimulatedProgram, Values, copied_state, float_program, in_chunks, move


def round_by_layers(runner: SimulatedProgram, inputs: Sequence[Values], request: RoundingRequest) -> dict[str, str]:
    """``round_in_sequence`` for a model that its program stands for; returns how each layer was rounded. The model's
    weights are still float when it starts. ``inputs`` are those of all samples of one size together, for each size.
    """
    simulated, program, how = runner.model, runner.program, {}
    floats = None
    if request.method.cross:
        floats = float_program(simulated.model, program, copied_state(program, simulated.model))
        floats.padding = runner.padding
    segments = between_layers(program, request.formats)
    ours = _parts_of(program, inputs)
    theirs = [] if floats is None else _parts_of(program, inputs)
    walk = _Walk(runner, floats, segments, ours, theirs, request)
    place = {name: i for i, segment in enumerate(segments) for name in segment.layers}
    outside = [name for name in request.formats if name not in place]  # they do not look at inputs
    for name in track([*outside, *place], "quantizing layers", enabled=request.progress):
        seen = partial(walk.moments, name, place.get(name, 0))
        weight, how[name] = request.rounded(simulated.floats, name, seen)
        simulated.set_weight(name, weight)
    return how


def _parts_of(program: Program, inputs: Sequence[Values]) -> list[list[Values]]:
    return [[part for part, _ in in_chunks(program, values)] for values in inputs]


@dataclass
class _Walk:
    """The samples of each size, in parts, as they enter segment number ``at`` in the quantized network and, where
    there is one, in the float one.
    """

    runner: SimulatedProgram
    floats: SimulatedProgram | None
    segments: Sequence[Segment]
    ours: list[list[Values]]
    theirs: list[list[Values]]
    request: RoundingRequest
    at: int = 0
    seen: tuple[tuple[int, int], Moments] | None = None

    def moments(self, name: str, place: int) -> Moments | None:
        """The moments of a layer's inputs, in this segment or a later one."""
        for passed in self.segments[self.at : place]:
            self.seen = None
            for parts in self.ours:
                move(self.runner, parts, passed)
            if self.floats is not None:
                for parts in self.theirs:
                    move(self.floats, parts, passed)
        self.at = place

        # Several linear layers that read one value, as query, key and value do, have the same moments.
        most, read = self.request.most(name, self.runner.program.weights[name]), _plainly_read(self.runner, name)
        if self.seen is not None and self.seen[0] == (read, most):
            return self.seen[1]
        floats = None if self.floats is None else (self.floats, [*chain(*self.theirs)])
        found = moments(self.runner, self.segments[place], name, [*chain(*self.ours)], floats, most)
        self.seen = None if read is None or found is None else ((read, most), found)
        return found


def _plainly_read(runner: SimulatedProgram, name: str) -> int | None:
    """The value whose rows are the inputs of a linear layer; None where it is called several times or has a site of
    its own, and for other layers.
    """
    program = runner.program
    if program.kinds[name] != "linear" or len(program.calls[name]) > 1:
        return None
    (call,) = program.calls[name]
    return None if read_place(call.key) in runner.sites else call.input


@torch.no_grad()
def moments(
    runner: SimulatedProgram,
    segment: Segment,
    name: str,
    parts: Sequence[Values],
    floats: tuple[SimulatedProgram, Sequence[Values]] | None = None,
    most: int = HESSIAN_BYTES,
) -> Moments | None:
    """The moments of a layer's inputs, given the values that enter a segment before all its calls, in ``floats`` those
    of the float network; in blocks where they are beyond ``most`` bytes. None where the layer is not called, or a
    recurrence does not say what it multiplies.
    """
    program = runner.program
    blocks = blocks_of(program.weights[name], most)
    sums: dict[str, Tensor] = {}
    draws, same_draws = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    calls = {call.key: call for call in program.calls[name]}
    for i in range(segment.start, len(program.steps)):
        step = program.steps[i]
        if step.key not in calls:
            continue
        read = _Read(step, name, calls[step.key], segment.until(i, step.inputs[0]))
        theirs = parts if floats is None else floats[1]
        for part, other in zip(parts, theirs, strict=True):
            inputs = read.inputs(runner, part, draws)
            if inputs is None:
                return None
            accumulate(sums, "hessian", inputs, blocks)
            if floats is not None:
                accumulate(sums, "cross", inputs, blocks, read.inputs(floats[0], other, same_draws))
    return Moments(sums["hessian"], sums.get("cross"), blocks.count) if sums else None


@dataclass(frozen=True)
class _Read:
    """A layer's call, and the part of its segment before it."""

    step: Step
    name: str
    call: LayerCall
    before: Segment

    def inputs(self, runner: SimulatedProgram, part: Values, draws: torch.Generator) -> LayerInputs | None:
        """What the call reads, as its site leaves it, given the values that enter the segment; None where a recurrence
        does not say.
        """
        if self.before.stop > self.before.start:  # steps on the way may write to their arguments
            part = {number: x.clone() for number, x in part.items()}
        first, shapes = self.step.inputs[0], runner.part(self.before, part).shapes
        read = dict(zip(self.step.inputs, runner.inside(part, self.before, self.step.inputs), strict=True))
        read[first] = runner.quantize(read_place(self.step.key), read[first])
        args, kwargs = self.step.called(read, shapes)
        kind = runner.program.kinds[self.name]
        if kind == "recurrent":
            return recurrent_inputs(runner.program, self.name, self.step, args)
        rows = as_rows if runner.padding is None else runner.padding.rows_of(self.call.input, part)
        return layer_inputs(kind, args, kwargs, draws, self.call.source, rows)
