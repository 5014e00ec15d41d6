"""A tape cut into blocks: runs of calls that one tensor enters and one leaves, with at least two layers each.

Residual blocks, transformer blocks and pairs of depthwise and pointwise convolutions all come out as blocks; names of
modules play no part.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

from quantkit.program.intercept import OpKey
from quantkit.program.tape import Tape
from quantkit.program.trace import Trace

LAYERS = 2  # in a block at least: one alone has nothing to adapt to


@dataclass(frozen=True)
class Segment:
    """Steps ``start`` to ``stop`` of a tape, the numbers of the values that enter and of the one that leaves, and the
    layers inside in execution order.
    """

    start: int
    stop: int
    entering: tuple[int, ...]
    leaving: int
    layers: tuple[str, ...]


def whole(tape: Tape, layers: Sequence[str]) -> Segment:
    """The whole forward as one segment."""
    return Segment(0, len(tape.steps), tape.inputs, tape.output, tuple(layers))


def blocks_of(tape: Tape, trace: Trace, layers: Collection[str], sites: Collection[OpKey] = ()) -> list[Segment]:
    """The blocks that hold the layers to quantize, from the model's inputs to its outputs; a network that cannot be
    cut is one block. Between two layers the cut is made at a site where there is one (a place in ``sites``): its
    tensor is then quantized by the block that reads it.
    """
    at = {call.key: name for name in layers for call in trace.calls[name]}
    positions = [(i, at[step.key]) for i, step in enumerate(tape.steps) if step.key in at]
    places, lone = tape.places(), tape.lone_values()
    cuts = []
    for (before, _), (after, _) in pairwise(positions):
        possible = [i for i in range(before, after) if i in lone]
        at_sites = [i for i in possible if places[lone[i]] in sites]
        if possible:
            cuts.append((at_sites or possible)[-1])
    blocks: list[Segment] = []
    start, entering = 0, tape.inputs
    for cut in [*_kept(cuts, positions), len(tape.steps) - 1]:
        leaving = tape.output if cut == len(tape.steps) - 1 else lone[cut]
        inside = tuple(dict.fromkeys(name for i, name in positions if start <= i <= cut))
        blocks.append(Segment(start, cut + 1, entering, leaving, inside))
        start, entering = cut + 1, (leaving,)
    return blocks


def _kept(cuts: Sequence[int], positions: Sequence[tuple[int, str]]) -> list[int]:
    """The cuts that leave enough layers on both sides and no layer in two blocks."""
    kept: list[int] = []
    start = 0
    for cut in cuts:
        inside = {name for i, name in positions if start <= i <= cut}
        after = {name for i, name in positions if i > cut}
        if len(inside) >= LAYERS and len(after) >= LAYERS and not inside & after:
            kept.append(cut)
            start = cut + 1
    return kept
