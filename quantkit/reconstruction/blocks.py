"""The network, or its blocks one after the other, learned to compute what the float ones do: codes, scales, biases
and activation steps together.

Blocks follow BRECQ (Li et al., arXiv 2102.05426): the squared error of a block's output, weighted by the Fisher
information of each of its elements, on inputs of which half the elements come from the network quantized so far and
half from the float one (QDrop). The whole network is one more block, whose error is the damage of softened outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from quantkit.formats import EIGHT_BITS
from quantkit.program.intercept import read_place
from quantkit.program.program import Program
from quantkit.program.segments import Segment, whole
from quantkit.reconstruction.learned import LearnedRange, LearnedWeight
from quantkit.reconstruction.learning import Rated, Schedule, Training, learn
from quantkit.reconstruction.snapshot import Learned
from quantkit.simulation.model import SimulatedModel
from quantkit.simulation.playback import (
    SimulatedProgram,
    Values,
    float_program,
    in_chunks,
    mixed,
    play,
    play_output,
    rows_first,
    take,
)

Damage = Callable[[Tensor, Tensor], Tensor]
Pull = Callable[[Tensor, torch.Generator], Tensor]
FISHER_SAMPLES = 256
RECONSTRUCTIONS = ("auto", "none", "adaquant", "adaquant-parallel", "block", "network")


@dataclass(frozen=True)
class ReconstructionData:
    """Model inputs to learn from and others held back, as values of the program, with the float model's outputs for
    both.
    """

    inputs: Values
    outputs: Tensor
    held_inputs: Values
    held_outputs: Tensor

    def __len__(self) -> int:
        return len(self.outputs)

    def first(self, count: int) -> ReconstructionData:
        """The first ``count`` inputs to learn from, and all that are held back."""
        inputs = {number: x[:count] if x.dim() else x for number, x in self.inputs.items()}
        return replace(self, inputs=inputs, outputs=self.outputs[:count])


@dataclass(frozen=True)
class FloatReference:
    """The float network: its parameters and buffers by name, the weight of every layer to learn, the standard
    deviation of its outputs by channel, ``damage`` of outputs (reference, found) row by row, ``softened``, a damage to
    learn by, and ``pull(output, generator)``, a number whose gradient has the Fisher information of the output as its
    second moment.
    """

    state: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    spread: Mapping[str, Tensor]
    damage: Damage
    softened: Damage
    pull: Pull


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


@torch.no_grad()
def mean_damage(runner: SimulatedProgram, values: Values, outputs: Tensor, damage: Damage) -> float:
    """The damage of the whole model over samples, as it would ship now."""
    found = torch.cat([runner.output(part) for part, _ in in_chunks(runner.program, values)])
    return float(damage(outputs, found).double().mean())


def learn_network(
    runner: SimulatedProgram,
    reference: FloatReference,
    data: ReconstructionData,
    training: Training,
    only_biases: bool = False,
) -> Learned:
    """Learn the whole network, or only its biases, by the softened damage of its output, and keep what lowers that on
    held-back inputs: the damage itself is that of the few among them on which the network hesitates.
    """

    def loss(indices: Tensor) -> Tensor:
        found = runner.output(take(runner.program, data.inputs, indices))
        return reference.softened(data.outputs[indices], found).mean()

    def held_back() -> float:
        return mean_damage(runner, data.held_inputs, data.held_outputs, reference.softened)

    begin(runner, reference, runner.model.weights, whole(runner.program))
    moved, title = rated(runner, training.schedule, only_biases), "biases" if only_biases else "network"
    learned = learn(moved, loss, held_back, len(data), training, title)
    settle(runner.model, runner.weights, runner.ranges)
    return learned


@dataclass(frozen=True)
class BlockData:
    """What a block learns from: the value entering it in the quantized and in the float network and the float block's
    output, first to learn from, then held back; ``importance`` weighs the squared errors.
    """

    segment: Segment
    quantized: Values
    floating: Values
    wanted: Tensor
    held_quantized: Values
    held_wanted: Tensor
    importance: Tensor

    def error(self, found: Tensor, wanted: Tensor) -> Tensor:
        found, wanted = (x.to(self.importance.device) for x in (found, wanted))
        return 0.5 * ((found - wanted).square() * self.importance).flatten(1).sum(1).mean()


def learn_block(
    runner: SimulatedProgram, reference: FloatReference, block_data: BlockData, training: Training
) -> Learned:
    """Learn one block by the weighted squared error of its output."""
    segment, generator = block_data.segment, training.generator

    def loss(indices: Tensor) -> Tensor:
        ours, theirs = (
            take(runner.program, values, indices) for values in (block_data.quantized, block_data.floating)
        )
        main = segment.raw & ours.keys()
        entering = {
            n: mixed(x, theirs[n], generator) if n in main and x.is_floating_point() else x for n, x in ours.items()
        }
        found = rows_first(runner.program, segment.output, runner.run(entering, segment))
        return block_data.error(found, block_data.wanted[indices])

    def held_back() -> float:
        found = rows_first(runner.program, segment.output, play_output(runner, block_data.held_quantized, segment))
        return float(block_data.error(found, block_data.held_wanted))

    begin(runner, reference, segment.layers, segment)
    runner.dropping = generator
    title = f"block of {segment.layers[0]}"
    learned = learn(rated(runner, training.schedule), loss, held_back, len(block_data.wanted), training, title)
    runner.dropping = None
    settle(runner.model, runner.weights, runner.ranges)
    return learned


def learn_blocks(
    runner: SimulatedProgram,
    reference: FloatReference,
    data: ReconstructionData,
    blocks: Sequence[Segment],
    training: Training,
) -> dict[str, Learned]:
    """Learn the blocks in order, each on the inputs it gets from those before it; the last one, from which the output
    leaves, is left to ``learn_network``. Held in memory: the inputs and outputs of one block. Blocks that are
    finished are not learned again.
    """
    weighing = fisher(runner.program, reference, data, blocks[:-1], training.generator)
    floats = float_program(runner.model.model, runner.program, reference.state)
    ours, held_ours = data.inputs, data.held_inputs
    theirs, held_theirs = data.inputs, data.held_inputs
    found = {}
    for segment, importance in zip(blocks, weighing, strict=False):
        after, held_after = play(floats, theirs, segment), play(floats, held_theirs, segment)
        wanted, held_wanted = (
            rows_first(runner.program, segment.output, values[segment.output]) for values in (after, held_after)
        )
        block_data = BlockData(segment, ours, theirs, wanted, held_ours, held_wanted, importance)
        work = partial(learn_block, runner, reference, block_data, training)
        title = " ".join(segment.layers)
        found[title] = training.cache.learned(f"block {title}", runner.model, segment.layers, work, training.generator)
        ours, held_ours = play(runner, ours, segment), play(runner, held_ours, segment)
        theirs, held_theirs = after, held_after
    return found


@torch.enable_grad()
def fisher(
    program: Program,
    reference: FloatReference,
    data: ReconstructionData,
    blocks: Sequence[Segment],
    generator: torch.Generator,
) -> list[Tensor]:
    """For the value leaving each block, the mean over samples of the squared gradient of the pulled output: the
    diagonal of the Fisher information, one weight per element of a sample.
    """
    numbers = [segment.output for segment in blocks]
    sums: list[Tensor] = []
    count = 0
    order = torch.randperm(len(data), generator=generator, device="cpu")[:FISHER_SAMPLES]
    some = take(program, data.inputs, order)
    device = next((x.device for x in reference.state.values()), some[program.inputs[0]].device)
    # gradients begin at the parameters: inputs may be token ids
    state = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in reference.state.items()}
    for part, samples in in_chunks(program, some):
        own = {n: x.to(device) for n, x in part.items()}
        values = program.replay(own, state, [*numbers, program.output])
        gradients = torch.autograd.grad(reference.pull(values[-1], generator), values[:-1])
        here = [rows_first(program, n, g).square().sum(0) for n, g in zip(numbers, gradients, strict=True)]
        sums = [total + more for total, more in zip(sums, here, strict=True)] if sums else here
        count += samples
    return [total / count for total in sums]
