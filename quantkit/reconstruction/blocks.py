"""The network, or its blocks one after the other, learned to compute what the float ones do: codes, scales, biases
and activation steps together.

Blocks follow BRECQ (Li et al., arXiv 2102.05426): the squared error of a block's output, weighted by the Fisher
information of each of its elements, on inputs of which half the elements come from the network quantized so far and
half from the float one (QDrop). The whole network is one more block, whose error is the damage of softened outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from quantkit.formats import EIGHT_BITS
from quantkit.program.intercept import read_place
from quantkit.program.segments import Segment, in_pairs, whole
from quantkit.reconstruction.block_error import BlockError, block_errors, has_positions
from quantkit.reconstruction.data import (
    HELD_BYTES,
    Examples,
    FloatReference,
    ReconstructionData,
    mean_damage,
    pieces,
    row_bytes,
)
from quantkit.reconstruction.learned import LearnedRange, LearnedWeight
from quantkit.reconstruction.learning import Rated, Schedule, Training, learn
from quantkit.reconstruction.snapshot import Learned
from quantkit.simulation.model import SimulatedModel
from quantkit.simulation.playback import (
    SimulatedProgram,
    Values,
    differentiated_at_once,
    float_program,
    growth,
    in_chunks,
    mixed,
    play,
    take,
)

RECONSTRUCTIONS = ("auto", "none", "adaquant", "adaquant-parallel", "block", "network")


def begin(runner: SimulatedProgram, reference: FloatReference, layers: Collection[str], segment: Segment) -> None:
    """Let the weights of ``layers`` be learned, and the steps of the sites below 8 bits that a segment quantizes."""
    model, program = runner.model, runner.program
    for name in [name for name in layers if model.floats.layers[name].reads_rows]:
        start, bias = model.weights[name], model.floats.bias(name)
        if start.integer:
            runner.weights[name] = LearnedWeight(reference.weights[name], start, bias, reference.spread[name])
    made = {step.key for step in program.steps[segment.start : segment.stop]}
    entering = {program.producer[number] for number in segment.raw if number in program.producer}
    inside = (made | {read_place(key) for key in made} | entering) - {program.producer.get(segment.output)}
    for site in model.sites:
        found, within = model.ranges.get(site.name), inside.issuperset(site.places)
        if found is not None and found.static and found.integer and found.bits < EIGHT_BITS and within:
            runner.ranges[site.name] = LearnedRange(found)


def rated(runner: SimulatedProgram, schedule: Schedule, only_biases: bool = False) -> list[Rated]:
    """Everything that is being learned, or only the biases, with its rate."""
    if only_biases:
        shifts = [w.bias_shift for w in runner.weights.values() if w.bias_start is not None]
        return [(shift, schedule.bias_rate) for shift in shifts]
    parts: list[LearnedWeight | LearnedRange] = [*runner.weights.values(), *runner.ranges.values()]
    return [one for part in parts for one in part.rated(schedule)]


@torch.no_grad()
def settle(model: SimulatedModel, weights: dict[str, LearnedWeight], ranges: dict[str, LearnedRange]) -> None:
    """Give a simulated model what was learned, and stop learning."""
    for name, weight in weights.items():
        model.set_weight(name, weight.found())
        bias, own = weight.bias(), model.floats.bias(name)
        if bias is not None and own is not None:
            own.copy_(bias)
    model.ranges.update({name: learned.found() for name, learned in ranges.items()})
    weights.clear()
    ranges.clear()


def learn_network(
    runner: SimulatedProgram,
    reference: FloatReference,
    data: Sequence[ReconstructionData],
    training: Training,
    only_biases: bool = False,
) -> Learned:
    """Learn the whole network, or only its biases, by the softened damage of its output, and keep what lowers that on
    held-back inputs: the damage itself is that of the few among them on which the network hesitates.
    """
    program, every = runner.program, whole(runner.program)
    floats = float_program(runner.model.model, program, reference.state)
    seen, held = [some.seen for some in data], [some.held for some in data]
    counts = [some.count for some in seen]
    at_once = [differentiated_at_once(program, every, growth(program, some.inputs)) for some in seen]

    def loss(size: int, own: Tensor) -> Tensor:
        part = take(program, seen[size].inputs, own)
        wanted = seen[size].wanted(floats, part, own)
        return reference.softened(wanted, runner.output(part), part).mean()

    begin(runner, reference, runner.model.weights, every)
    moved, title = rated(runner, training.schedule, only_biases), "biases" if only_biases else "network"
    losses = partial(losses_of, runner, counts, at_once, loss)
    held_back = partial(mean_damage, runner, floats, held, reference.softened)
    learned = learn(moved, losses, held_back, sum(counts), training, title)
    settle(runner.model, runner.weights, runner.ranges)
    return learned


def losses_of(
    runner: SimulatedProgram,
    counts: Sequence[int],
    at_once: Sequence[int],
    loss: Callable[[int, Tensor], Tensor],
    indices: Tensor,
) -> Iterator[Tensor]:
    """The shares of a batch's loss that some of its samples have, all of one size and at most so many ``at_once``."""
    found = list(pieces(counts, at_once, indices))
    with runner.sharing_weights() if len(found) > 1 else nullcontext():
        for size, own in found:
            yield loss(size, own) * (len(own) / len(indices))


@dataclass(frozen=True)
class BlockData:
    """Samples of one size at a block: the values that enter it in the quantized and in the float network, what the
    float block makes of the latter, None where that is computed whenever it is wanted, and the model's inputs.
    """

    inputs: Values
    count: int
    quantized: Values
    floating: Values
    wanted: Values | None

    @classmethod
    def first(cls, examples: Examples) -> BlockData:
        """The samples as the model gets them."""
        return cls(examples.inputs, examples.count, examples.inputs, examples.inputs, None)

    def before(self, floats: SimulatedProgram, segment: Segment) -> BlockData:
        """The same, with what the float block makes of it, unless that are large outputs of the network."""
        program, output = floats.program, segment.output
        large = self.count * row_bytes(program, output, self.floating) > HELD_BYTES
        wanted = None if large and output == program.output else play(floats, self.floating, segment)
        return replace(self, wanted=wanted)

    def after(self, runner: SimulatedProgram, floats: SimulatedProgram, segment: Segment) -> BlockData:
        """The samples behind a block that has been learned."""
        theirs = play(floats, self.floating, segment) if self.wanted is None else self.wanted
        return replace(self, quantized=play(runner, self.quantized, segment), floating=theirs, wanted=None)


@dataclass(frozen=True)
class Block:
    """A block to learn, in the quantized and in the float network, by an ``error`` of its output. ``mixing``: half the
    elements that enter it come from the float network.
    """

    runner: SimulatedProgram
    floats: SimulatedProgram
    segment: Segment
    error: BlockError
    mixing: bool

    def wanted(self, data: BlockData, which: Tensor) -> Tensor:
        """What the float block makes of some samples."""
        program, output = self.runner.program, self.segment.output
        if data.wanted is not None:
            return take(program, {output: data.wanted[output]}, which)[output]
        with torch.no_grad():
            return self.floats.run(take(program, data.floating, which), self.segment)

    def loss(self, data: BlockData, which: Tensor, generator: torch.Generator) -> Tensor:
        """The error for some samples."""
        program, entering = self.runner.program, take(self.runner.program, data.quantized, which)
        if self.mixing:
            main = {n for n in self.segment.raw & entering.keys() if entering[n].is_floating_point()}
            theirs = take(program, data.floating, which)
            entering = {n: mixed(x, theirs[n], generator) if n in main else x for n, x in entering.items()}
        found = self.runner.run(entering, self.segment)
        return self.error(found, self.wanted(data, which), take(program, data.inputs, which))

    @torch.no_grad()
    def mean_error(self, every: Sequence[BlockData]) -> float:
        """The error for all samples, as the network would ship now."""
        program, total = self.runner.program, 0.0
        for data in every:
            start = 0
            for part, count in in_chunks(program, data.quantized):
                which = torch.arange(start, start + count, device="cpu")
                found = self.runner.run(part, self.segment)
                error = self.error(found, self.wanted(data, which), take(program, data.inputs, which))
                total, start = total + count * float(error), start + count
        return total / sum(data.count for data in every)


def learn_block(block: Block, reference: FloatReference, data: BlockSplit, training: Training) -> Learned:
    """Learn one block by the weighted squared error of its output."""
    runner, segment, generator = block.runner, block.segment, training.generator
    program, counts = runner.program, [some.count for some in data.seen]
    larger = [growth(program, some.quantized) for some in data.seen]
    at_once = [differentiated_at_once(program, segment, one) for one in larger]

    def loss(size: int, own: Tensor) -> Tensor:
        return block.loss(data.seen[size], own, generator)

    begin(runner, reference, segment.layers, segment)
    runner.dropping = generator
    losses, held_back = partial(losses_of, runner, counts, at_once, loss), partial(block.mean_error, data.held)
    title = f"block of {segment.layers[0]}"
    learned = learn(rated(runner, training.schedule), losses, held_back, sum(counts), training, title)
    runner.dropping = None
    settle(runner.model, runner.weights, runner.ranges)
    return learned


@dataclass(frozen=True)
class BlockSplit:
    """What a block is learned from, and what is held back."""

    seen: Sequence[BlockData]
    held: Sequence[BlockData]

    def before(self, floats: SimulatedProgram, segment: Segment) -> BlockSplit:
        """The same with what the float block makes of it."""
        return BlockSplit(*([some.before(floats, segment) for some in every] for every in (self.seen, self.held)))

    def after(self, runner: SimulatedProgram, floats: SimulatedProgram, segment: Segment) -> BlockSplit:
        """The samples behind a block that has been learned."""
        both = (self.seen, self.held)
        return BlockSplit(*([some.after(runner, floats, segment) for some in every] for every in both))


def learn_blocks(
    runner: SimulatedProgram,
    reference: FloatReference,
    data: Sequence[ReconstructionData],
    blocks: Sequence[Segment],
    training: Training,
) -> dict[str, Learned]:
    """Learn the blocks in order, each on the inputs it gets from those before it; the last one, from which the output
    leaves, is left to ``learn_network`` unless its output has positions. Held in memory: the inputs and outputs of one
    block. Blocks that are finished are not learned again.
    """
    positions = has_positions(runner.program, runner.program.output)
    blocks = in_pairs(blocks) if positions else blocks
    program, seen = runner.program, [some.seen for some in data]
    floats = float_program(runner.model.model, program, reference.state)
    errors = block_errors(program, reference, seen, blocks, runner.padding, training.generator)
    held = [some.held for some in data if some.held.count]
    split = BlockSplit([BlockData.first(some) for some in seen], [BlockData.first(some) for some in held])
    found = {}
    for segment, error in zip(blocks, errors, strict=False):
        split = split.before(floats, segment)
        work = partial(learn_block, Block(runner, floats, segment, error, not positions), reference, split, training)
        title = " ".join(segment.layers)
        found[title] = training.cache.learned(f"block {title}", runner.model, segment.layers, work, training.generator)
        if segment is not blocks[-1]:
            split = split.after(runner, floats, segment)
    return found
