"""A program cut into segments: runs of calls with at least two layers each, which one value of the network enters and
one leaves.

Residual blocks, transformer blocks and pairs of depthwise and pointwise convolutions all come out as segments; names
of modules play no part. Beside that value others may pass the cut: masks, rotations and position biases, which no
layer has computed on, and what several layers further on still read, as every block of a decoder reads the encoder's
output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from quantkit.program.intercept import OpKey
from quantkit.program.program import Program

LAYERS = 2  # in a segment at least: one alone has nothing to adapt to
READERS = 2  # layers that read a value behind a cut, for it to be carried past several cuts


@dataclass(frozen=True)
class Segment:
    """Steps ``start`` to ``stop`` of a program, the numbers of the values that enter and leave, and the layers inside
    in execution order. ``output`` is the value that the segment is there for; what else leaves is carried on.
    ``raw`` are the entering values that no site has quantized yet: inputs, and outputs of earlier segments.
    """

    start: int
    stop: int
    entering: tuple[int, ...]
    leaving: tuple[int, ...]
    output: int
    layers: tuple[str, ...] = ()
    raw: frozenset[int] = frozenset()

    def until(self, stop: int, output: int) -> Segment:
        """The part of the segment before step ``stop``, for the sake of one value."""
        return Segment(self.start, stop, self.entering, (output,), output, (), self.raw)


def whole(program: Program) -> Segment:
    """The whole forward as one segment."""
    inputs = program.inputs
    return Segment(0, len(program.steps), inputs, (program.output,), program.output, raw=frozenset(inputs))


@dataclass(frozen=True)
class _Cut:
    """After step ``after``: the value that the network continues from, and all that are read later."""

    after: int
    main: int
    live: tuple[int, ...]


def blocks_of(program: Program, layers: Collection[str], sites: Collection[OpKey] = ()) -> list[Segment]:
    """The segments that hold the layers to quantize, from the model's inputs to its outputs; a network that cannot be
    cut is one. Between two layers the cut is made at a site where there is one (a place in ``sites``): its tensor is
    then quantized by the segment that reads it.
    """
    at = {
        call.key: name
        for name in layers
        if program.weights[name].reads_rows  # a table that is looked up may also be read at the end
        for call in program.calls.get(name, ())
    }
    positions = [(i, at[step.key]) for i, step in enumerate(program.steps) if step.key in at]
    possible = cuts_of(program)
    chosen = []
    for (before, _), (after, _) in pairwise(positions):
        between = [possible[i] for i in range(before, after) if i in possible]
        at_sites = [cut for cut in between if program.producer.get(cut.main) in sites]
        if between:
            chosen.append((at_sites or between)[-1])
    return _segments(program, _kept(chosen, positions), positions)


def in_pairs(blocks: Sequence[Segment]) -> list[Segment]:
    """Blocks joined two by two, as the attention and the feed-forward part of a transformer's layer are."""
    found = []
    for first, *rest in (blocks[i : i + 2] for i in range(0, len(blocks), 2)):
        last = rest[0] if rest else first
        layers = tuple(dict.fromkeys(name for one in (first, *rest) for name in one.layers))
        found.append(replace(last, start=first.start, entering=first.entering, layers=layers, raw=first.raw))
    return found


def _segments(program: Program, cuts: Sequence[_Cut], positions: Sequence[tuple[int, str]]) -> list[Segment]:
    segments: list[Segment] = []
    start, entering, raw = 0, program.inputs, frozenset(program.inputs)
    last = _Cut(len(program.steps) - 1, program.output, (program.output,))
    for cut in (*cuts, last):
        inside = tuple(dict.fromkeys(name for i, name in positions if start <= i <= cut.after))
        segments.append(Segment(start, cut.after + 1, entering, cut.live, cut.main, inside, raw))
        start, entering, raw = cut.after + 1, cut.live, raw | {cut.main}
    return segments


def between_layers(program: Program, layers: Collection[str]) -> list[Segment]:
    """The program cut before each layer, whatever number of values passes there: one replay in parts comes past every
    layer, in the order of their first calls. Layers that read the same value share a segment, as do those before which
    the values cannot be held. All that enters behind the first cut is as its sites leave it.
    """
    starts = _starts_of(program, layers)
    live = _live_before(program)
    cuts: list[tuple[int, tuple[int, ...], list[str]]] = [(0, program.inputs, [])]
    last_read = None
    for name, i in starts.items():
        reads = program.calls[name][0].input
        if reads != last_read and _can_be_held(program, i, live[i]):
            cuts.append((i, live[i], []))
        cuts[-1][2].append(name)
        last_read = reads

    ends = [*((at, passing) for at, passing, _ in cuts[1:]), (len(program.steps), (program.output,))]
    raw = [frozenset(program.inputs), *(frozenset[int]() for _ in cuts[1:])]
    return [
        Segment(start, stop, entering, leaving, leaving[0], tuple(names), first)
        for (start, entering, names), (stop, leaving), first in zip(cuts, ends, raw, strict=True)
    ]


def _starts_of(program: Program, layers: Collection[str]) -> dict[str, int]:
    """Layer -> the step before which a replay has to halt for it, in the order of first calls: behind it the weight of
    this layer or of a later one is read, if only to be turned or divided.
    """
    position = {step.key: i for i, step in enumerate(program.steps)}
    first = {name: min(position[call.key] for call in program.calls[name]) for name in layers if name in program.calls}
    starts, earliest = {}, len(program.steps)
    for name in sorted(first, key=first.__getitem__, reverse=True):
        earliest = min(earliest, first[name], program.first_use(program.weights[name]))
        starts[name] = earliest
    return dict(reversed(starts.items()))


def _live_before(program: Program) -> list[tuple[int, ...]]:
    """The values that each step and those behind it read of what is there before it."""
    last = program.last_reads(0, len(program.steps)) | {program.output: len(program.steps)}
    live, found = set(program.inputs), []
    for i, step in enumerate(program.steps):
        live = {number for number in live if last.get(number, -1) >= i}
        found.append(tuple(sorted(live)))
        if not step.constant:
            live.update(step.makes, (new for _, new in step.rewrites))
    return found


def _can_be_held(program: Program, start: int, live: Collection[int]) -> bool:
    """Whether a replay from step ``start`` can begin with these values: there are rows of samples, and no two of them
    are in one piece of memory that is written to.
    """
    writes = ({old for old, _ in step.rewrites} for step in program.steps[start:])
    apart = all(len(written.intersection(live)) < 2 for written in writes)
    return apart and _can_pass(program, live) and not program.rows.keys().isdisjoint(live)


def cuts_of(program: Program) -> dict[int, _Cut]:
    """Step -> the cut behind it, where a forward can be cut in two."""
    last = program.last_reads(0, len(program.steps)) | {program.output: len(program.steps)}
    behind = _behind_layers(program)
    readers = Counter(n for i in range(len(program.steps)) for n in _read_by_layer(program, i))
    live = set(program.inputs)
    mains: set[int] = set()
    found = {}
    for i, step in enumerate(program.steps):
        if step.constant:
            continue
        readers.subtract(_read_by_layer(program, i))
        made = (*step.makes, *(new for _, new in step.rewrites))
        live = {number for number in (*live, *made) if last.get(number, -1) > i}
        carried = {n for n in live if n not in behind or (n in mains and readers[n] >= READERS)}
        if len(rest := live - carried) != 1 or not _can_pass(program, carried):
            continue
        (main,) = rest
        if main in program.floating and main in program.rows:
            found[i] = _Cut(i, main, (main, *sorted(carried)))
            mains.add(main)
    return found


def _can_pass(program: Program, carried: Collection[int]) -> bool:
    """Whether values have a row for each sample, or are the same for all of them."""
    return all(number in program.rows or number not in program.varying for number in carried)


def _behind_layers(program: Program) -> set[int]:
    """The values that depend on what a layer makes of a varying value; what is looked up in a table does not."""
    layers = {call.key for name, calls in program.calls.items() if program.weights[name].reads_rows for call in calls}
    behind: set[int] = set()
    for step in program.steps:
        depends = not behind.isdisjoint(step.inputs)
        if depends or (step.key in layers and not program.varying.isdisjoint(step.inputs)):
            behind.update(step.makes, (new for _, new in step.rewrites))
    return behind & program.varying


def _read_by_layer(program: Program, i: int) -> tuple[int, ...]:
    step = program.steps[i]
    return step.inputs[:1] if step.key in program.layer_of else ()


def _kept(cuts: Sequence[_Cut], positions: Sequence[tuple[int, str]]) -> list[_Cut]:
    """The cuts that leave enough layers on both sides and no layer in two segments."""
    kept: list[_Cut] = []
    start = 0
    for cut in cuts:
        inside = {name for i, name in positions if start <= i <= cut.after}
        after = {name for i, name in positions if i > cut.after}
        if len(inside) >= LAYERS and len(after) >= LAYERS and not inside & after:
            kept.append(cut)
            start = cut.after + 1
    return kept
