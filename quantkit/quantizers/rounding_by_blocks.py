"""Rounding in sequence, a block at a time: every layer on the inputs it really gets, without running what comes before
the block again. Held in memory: the value that enters the block, for all samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from quantkit.formats import WeightFormat
from quantkit.graph.layers import groups_of, weight_of
from quantkit.graph.segments import Segment
from quantkit.graph.trace import Trace
from quantkit.progress import track
from quantkit.quantizers.layer_inputs import input_columns
from quantkit.quantizers.playback import Playback, Values, in_chunks, play
from quantkit.quantizers.statistics import accumulate
from quantkit.quantizers.weights import quantize_weight, rounding_note


def round_by_blocks(
    playback: Playback,
    trace: Trace,
    blocks: Sequence[Segment],
    formats: Mapping[str, WeightFormat],
    inputs: Values,
    rounding: str = "auto",
    progress: bool = True,
) -> dict[str, str]:
    """``round_in_sequence`` for a model with a tape; returns how each layer was rounded."""
    simulated, how = playback.model, {}
    values = dict(inputs)
    blocks_of = {name: block for block in blocks for name in block.layers}
    names = [name for block in blocks for name in block.layers if name in formats]
    for name, after in zip(track(names, "quantizing layers", enabled=progress), [*names[1:], None], strict=True):
        block, weight = blocks_of[name], weight_of(simulated.model, name)
        hessian = None if rounding == "nearest" else hessian_within(playback, trace, block, name, values)
        rounded = quantize_weight(weight, [formats[name]], hessian, groups_of(simulated.model, name))
        simulated.set_weight(name, rounded.weights[formats[name]])
        how[name] = rounding_note(name, rounded, rounding)
        if rounding != "nearest" and after is not None and blocks_of[after] is not block:
            for passed in blocks[blocks.index(block) : blocks.index(blocks_of[after])]:
                values = {passed.leaving: play(playback, values, passed)}
    return how


@torch.no_grad()
def hessian_within(playback: Playback, trace: Trace, block: Segment, name: str, values: Values) -> Tensor:
    """Sum of X^T X over the inputs of a layer, (groups, K, K) float64, given the values that enter its block."""
    tape = playback.tape
    sums: dict[str, Tensor] = {}
    draws = torch.Generator().manual_seed(0)
    keys = {call.key for call in trace.calls[name]}
    for i in range(block.start, block.stop):
        step = tape.steps[i]
        if step.key not in keys:
            continue
        before = Segment(block.start, i, block.entering, step.reads[0], ())
        for part, count in in_chunks(tape, values):
            found = dict(zip(step.reads, playback.inside(part, before, step.reads), strict=True))
            args, kwargs = step.arguments(found)
            accumulate(sums, name, input_columns(trace.kinds[name], args, kwargs, count, draws))
    return sums[name]
