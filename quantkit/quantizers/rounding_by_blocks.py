"""Rounding in sequence, a block at a time: every layer on the inputs it really gets, without running what comes before
the block again. Held in memory: the value that enters the block, for all samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.formats import WeightFormat
from quantkit.graph.layers import groups_of, weight_of
from quantkit.graph.segments import Segment
from quantkit.graph.tape import Step
from quantkit.graph.trace import Trace
from quantkit.progress import track
from quantkit.quantizers.layer_inputs import input_columns
from quantkit.quantizers.playback import Playback, Values, copied_state, float_playback, in_chunks, play
from quantkit.quantizers.statistics import accumulate
from quantkit.quantizers.weights import WITHOUT_INPUTS, quantize_weight, rounding_note


@dataclass(frozen=True)
class Moments:
    """Of a layer's inputs X in the quantized network: the sum of X^T X, (groups, K, K) float64, and where it was asked
    for that of Y^T X, Y its inputs in the float network.
    """

    hessian: Tensor
    cross: Tensor | None = None


def round_by_blocks(
    playback: Playback,
    trace: Trace,
    blocks: Sequence[Segment],
    formats: Mapping[str, WeightFormat],
    inputs: Values,
    rounding: str = "auto",
    progress: bool = True,
) -> dict[str, str]:
    """``round_in_sequence`` for a model with a tape; returns how each layer was rounded. The model's weights are still
    float when it starts.
    """
    simulated, tape, how = playback.model, playback.tape, {}
    floats = None
    if rounding == "gptaq":
        floats = float_playback(simulated.model, tape, copied_state(tape, simulated.model))
    ours = theirs = dict(inputs)
    blocks_of = {name: block for block in blocks for name in block.layers}
    names = [name for block in blocks for name in block.layers if name in formats]
    for name, after in zip(track(names, "quantizing layers", enabled=progress), [*names[1:], None], strict=True):
        block, weight = blocks_of[name], weight_of(simulated.model, name)
        seen = None
        if rounding not in WITHOUT_INPUTS:
            seen = moments(playback, trace, block, name, ours, None if floats is None else (floats, theirs))
        hessian, cross = (seen.hessian, seen.cross) if seen is not None else (None, None)
        groups = groups_of(simulated.model, name)
        rounded = quantize_weight(weight, [formats[name]], hessian, groups, rounding, cross)
        simulated.set_weight(name, rounded.weights[formats[name]])
        how[name] = rounding_note(name, rounded, rounding)
        if seen is not None and after is not None and blocks_of[after] is not block:
            for passed in blocks[blocks.index(block) : blocks.index(blocks_of[after])]:
                ours = {passed.leaving: play(playback, ours, passed)}
                theirs = theirs if floats is None else {passed.leaving: play(floats, theirs, passed)}
    return how


@torch.no_grad()
def moments(
    playback: Playback,
    trace: Trace,
    block: Segment,
    name: str,
    values: Values,
    floats: tuple[Playback, Values] | None = None,
) -> Moments:
    """The moments of a layer's inputs, given the values that enter its block, in ``floats`` those of the float
    network.
    """
    tape = playback.tape
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
            columns = _columns(playback, before, step, part, trace.kinds[name], count, draws)
            accumulate(sums, "hessian", columns)
            if floats is not None:
                wanted = _columns(floats[0], before, step, other, trace.kinds[name], count, same_draws)
                accumulate(sums, "cross", columns, wanted)
    return Moments(sums["hessian"], sums.get("cross"))


def _columns(
    playback: Playback, before: Segment, step: Step, part: Values, kind: str, count: int, draws: torch.Generator
) -> Tensor:
    found = dict(zip(step.reads, playback.inside(part, before, step.reads), strict=True))
    return input_columns(kind, *step.arguments(found), count, draws)
