"""Rounding in sequence, a block at a time: every layer on the inputs it really gets, without running what comes before
the block again. Held in memory: the value that enters the block, for all samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.formats import WeightFormat
from quantkit.program.intercept import read_place
from quantkit.program.segments import Segment
from quantkit.program.tape import Step
from quantkit.program.trace import Trace
from quantkit.progress import track
from quantkit.ranges.statistics import accumulate
from quantkit.reconstruction.snapshot import Cache
from quantkit.rounding.layer_inputs import input_columns
from quantkit.rounding.weights import WITHOUT_INPUTS, rounded_layer
from quantkit.simulation.playback import SimulatedProgram, Values, copied_state, float_program, in_chunks, play


@dataclass(frozen=True)
class Moments:
    """Of a layer's inputs X in the quantized network: the sum of X^T X, (groups, K, K) float64, and where it was asked
    for that of Y^T X, Y its inputs in the float network.
    """

    hessian: Tensor
    cross: Tensor | None = None


def round_by_blocks(
    runner: SimulatedProgram,
    trace: Trace,
    blocks: Sequence[Segment],
    formats: Mapping[str, WeightFormat],
    inputs: Values,
    rounding: str = "auto",
    progress: bool = True,
    finished: Cache | None = None,
) -> dict[str, str]:
    """``round_in_sequence`` for a model with a tape; returns how each layer was rounded. The model's weights are still
    float when it starts.
    """
    kept = finished or Cache()
    simulated, tape, how = runner.model, runner.tape, {}
    floats = None
    if rounding == "gptaq":
        floats = float_program(simulated.model, tape, copied_state(tape, simulated.model))
    ours = theirs = dict(inputs)
    at = 0  # the block that they enter
    place = {name: i for i, block in enumerate(blocks) for name in block.layers}
    for name in track([name for name in place if name in formats], "quantizing layers", enabled=progress):
        found = kept.rounded(name, formats[name])
        if found is None:
            seen = None
            if rounding not in WITHOUT_INPUTS:
                for passed in blocks[at : place[name]]:
                    ours = {passed.leaving: play(runner, ours, passed)}
                    theirs = theirs if floats is None else {passed.leaving: play(floats, theirs, passed)}
                at = place[name]
                seen = moments(runner, trace, blocks[at], name, ours, None if floats is None else (floats, theirs))
            hessian, cross = (None, None) if seen is None else (seen.hessian, seen.cross)
            found = rounded_layer(simulated.model, name, formats[name], hessian, cross, rounding)
            kept.keep_rounded(name, *found)
        simulated.set_weight(name, found[0])
        how[name] = found[1]
    return how


@torch.no_grad()
def moments(
    runner: SimulatedProgram,
    trace: Trace,
    block: Segment,
    name: str,
    values: Values,
    floats: tuple[SimulatedProgram, Values] | None = None,
) -> Moments:
    """The moments of a layer's inputs, given the values that enter its block, in ``floats`` those of the float
    network.
    """
    tape = runner.tape
    sums: dict[str, Tensor] = {}
    draws, same_draws = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    keys = {call.key for call in trace.calls[name]}
    for i in range(block.start, block.stop):
        step = tape.steps[i]
        if step.key not in keys:
            continue
        before = Segment(block.start, i, block.entering, step.reads[0], ())
        theirs = values if floats is None else floats[1]
        for (part, count), (other, _) in zip(in_chunks(tape, values), in_chunks(tape, theirs), strict=True):
            columns = _columns(runner, before, step, part, trace.kinds[name], count, draws)
            accumulate(sums, "hessian", columns)
            if floats is not None:
                wanted = _columns(floats[0], before, step, other, trace.kinds[name], count, same_draws)
                accumulate(sums, "cross", columns, wanted)
    return Moments(sums["hessian"], sums.get("cross"))


def _columns(
    runner: SimulatedProgram, before: Segment, step: Step, part: Values, kind: str, count: int, draws: torch.Generator
) -> Tensor:
    found = dict(zip(step.reads, runner.inside(part, before, step.reads), strict=True))
    found[step.reads[0]] = runner.quantize(read_place(step.key), found[step.reads[0]])
    return input_columns(kind, *step.arguments(found), count / runner.tape.size, draws)
