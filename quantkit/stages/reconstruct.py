"""Learning after rounding: what to learn from, whether it is worth it, and how the result compares on inputs that were
held back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from quantkit.errors import InvalidRequest
from quantkit.program.inputs import Batch, batch_size, picked_samples
from quantkit.program.intercept import OpKey, tensors_of
from quantkit.program.padding import Padding, as_rows, live_positions
from quantkit.program.program import Program
from quantkit.program.segments import whole
from quantkit.progress import notice
from quantkit.reconstruction.adaquant import learn_layers
from quantkit.reconstruction.augmentation import changed, harmless
from quantkit.reconstruction.block_error import has_positions
from quantkit.reconstruction.blocks import learn_blocks, learn_network
from quantkit.reconstruction.corrections import best_factor, head_of, match_outputs, scale_layer
from quantkit.reconstruction.data import Examples, FloatReference, ReconstructionData, examples_of, mean_damage
from quantkit.reconstruction.learning import LearningOptions, Schedule, Training
from quantkit.reconstruction.snapshot import Cache, Learned, Snapshot
from quantkit.sensitivity.damage import SOFTENED, Damage, RowDamage
from quantkit.sensitivity.inputs import mixed_pairs
from quantkit.simulation.model import SimulatedModel
from quantkit.simulation.playback import (
    SimulatedProgram,
    Values,
    copied_state,
    float_program,
    play_output,
    played_at_once,
    room_for,
)
from quantkit.stages.recording import Recording, some_samples
from quantkit.transforms.prepare import Prepared

LEAST_SAMPLES = 64  # with fewer, what is learned is the samples
WORTH_LEARNING = 5  # bits of a weight: above, rounding alone is as good
WORTH_BLOCKS = 3  # and up to here it is worth the time to learn block by block first
AUTO = ("norm", "bias", "tuning")  # corrections: how sure to be of unseen inputs, held-back ones say too vaguely
ADAQUANT = ("adaquant", "adaquant-parallel")
EVERY_BLOCK = "all blocks"  # among the notes


@dataclass(frozen=True)
class ReconstructionPlan:
    """Everything learning needs from the float model, kept before its weights are rounded. ``block_data``: the part
    of the data that blocks and layers learn from. Data of each size are together.
    """

    recording: Recording
    reference: FloatReference
    data: tuple[ReconstructionData, ...]
    block_data: tuple[ReconstructionData, ...]
    seed: int
    learning: LearningOptions
    logits: bool  # whether outputs are logits, as far as the damage is concerned
    padding: Padding | None = None

    @property
    def held(self) -> list[Examples]:
        """What is held back."""
        return [some.held for some in self.data]

    @property
    def positions(self) -> bool:
        """Whether the output has a row at every position of a sample."""
        return has_positions(self.recording.program, self.recording.program.output)

    @property
    def schedules(self) -> tuple[Schedule, Schedule]:
        """The schedule of blocks, and that of the network."""
        return self.learning.of_blocks_and_network(self.positions)

    def on(self, simulated: SimulatedModel) -> SimulatedProgram:
        """A simulated model on the program."""
        return SimulatedProgram(simulated, self.recording.program, padding=self.padding)

    def training(self, schedule: Schedule, progress: bool, kept: Cache) -> Training:
        """How anything of it is learned, with draws that begin anew."""
        return Training(schedule, torch.Generator().manual_seed(self.seed), progress, kept)


def worth_learning(weight_bits: Collection[int], site_bits: Collection[int], batches: Sequence[Batch]) -> bool:
    """What "auto" decides by: codes of few bits, and samples enough not to learn them by heart."""
    narrow = min(weight_bits, default=8) <= WORTH_LEARNING or min(site_bits, default=8) < 8
    return narrow and samples_enough(batches)


def samples_enough(batches: Sequence[Batch]) -> bool:
    """Whether there are samples enough to learn from."""
    return sum(map(batch_size, batches)) >= LEAST_SAMPLES


def method_to_learn(
    how: str, weight_bits: Collection[int], site_bits: Collection[int], positions: bool = False
) -> str:
    """What is learned when asked for ``how``: for "auto" blocks first, then the network, where codes are narrowest or
    the output has ``positions``, and the network alone elsewhere.
    """
    narrowest = min(weight_bits, default=8) <= WORTH_BLOCKS or min(site_bits, default=8) < 8
    return how if how != "auto" else "block" if narrowest or positions else "network"


def plan_reconstruction(
    ready: Prepared, recording: Recording | str, damage: Damage, seed: int, learning: LearningOptions
) -> ReconstructionPlan | str:
    """The reconstruction of a model that is still float, or why there is none."""
    if isinstance(recording, str):
        return recording
    generator, program = torch.Generator().manual_seed(seed), recording.program
    count = recording.count
    held = max(2, count // learning.held_back)
    if count - held < 2:
        return f"{count} samples are too few"
    splits = _splits(recording, torch.randperm(count, generator=generator, device="cpu"), held)
    training = max((seen for seen, _ in splits), key=batch_size)
    reference = _reference(
        ready, program, damage, some_samples(training, torch.arange(played_at_once(program), device="cpu"))
    )
    floats = float_program(ready.model, program, reference.state)

    def entering(batch: Batch) -> Values:
        return program.entering(ready.model, batch)

    # images are also learned from as the network could have seen them
    few = some_samples(training, torch.arange(min(learning.changed_samples, batch_size(training)), device="cpu"))
    changes = _harmless(few, floats, entering, reference, generator)
    room, most = learning.drawn_bytes, learning.few_draws
    drawn = partial(_drawn, floats, entering, changes, generator)
    data = [
        ReconstructionData(drawn(seen, _draws(seen, learning.draws, room)), drawn(kept, _draws(kept, most, room)))
        for seen, kept in splits
    ]
    few_draws = [some.first(most * batch_size(seen)) for some, (seen, _) in zip(data, splits, strict=True)]
    return ReconstructionPlan(
        recording, reference, tuple(data), tuple(few_draws), seed, learning, damage.main.softens, ready.padding
    )


def _splits(recording: Recording, order: Tensor, held: int) -> list[tuple[Batch, Batch]]:
    """Of the samples of each size those to learn from and those held back, the first ``held`` in this order."""
    found, start = [], 0
    for batch in recording.samples:
        stop = start + batch_size(batch)
        seen, kept = (some[(some >= start) & (some < stop)] - start for some in (order[held:], order[:held]))
        if len(seen):
            found.append((picked_samples(batch, seen), picked_samples(batch, kept)))
        start = stop
    return found


def _harmless(
    few: Batch,
    floats: SimulatedProgram,
    entering: Callable[[Batch], Values],
    reference: FloatReference,
    generator: torch.Generator,
) -> tuple[str, ...]:
    """The changes of images that the float network hardly minds, with a notice of them."""
    every, inputs = whole(floats.program), entering(few)
    changes = harmless(
        few,
        lambda one: play_output(floats, entering(one), every),
        lambda wanted, found: reference.damage(wanted, found, inputs),
        generator,
    )
    if changes:
        notice(f"learning from images that are also {' and '.join(changes)}: the float outputs hardly change")
    return changes


def _reference(ready: Prepared, program: Program, damage: Damage, few: Batch) -> FloatReference:
    """The float network, with the spread of its layers' outputs on a few samples."""
    state, measure, answer = copied_state(program, ready.model), damage.main, damage.rule.answer
    masks = {} if ready.padding is None else ready.padding.masks
    mask = next((number for number, argument in masks.items() if argument == damage.rule.mask), None)

    def rows(output: Tensor, inputs: Values) -> Tensor:
        """(rows, classes) of an output, without padding."""
        return answer.rows(output, None if mask is None else live_positions(inputs[mask], masks[mask]))

    return FloatReference(
        state,
        {name: ready.weights[name].detach().clone() for name in ready.quantizable},
        _spreads(ready, program, state, program.entering(ready.model, few)),
        lambda wanted, found, inputs: measure.rows(rows(wanted.to(found.device), inputs), rows(found, inputs)),
        lambda wanted, found, inputs: measure.smooth_rows(
            rows(wanted.to(found.device), inputs), rows(found, inputs), SOFTENED
        ),
        lambda output, inputs, draw: _pull(measure, rows(output, inputs), draw),
    )


def _pull(measure: RowDamage, rows: Tensor, draw: torch.Generator) -> Tensor:
    return (measure.cotangent(rows.detach(), draw) * rows).sum()


def _draws(batch: Batch, most: int, room: int) -> int:
    """How many draws of a batch there are, ``most`` where they fit into so many bytes."""
    bytes_each = sum(t.numel() * t.element_size() for t in tensors_of(batch))
    return max(1, min(most, room // max(1, bytes_each)))


def _drawn(
    floats: SimulatedProgram,
    entering: Callable[[Batch], Values],
    changes: Sequence[str],
    generator: torch.Generator,
    batch: Batch,
    draws: int,
) -> Examples:
    """Inputs with these changes and pair-mixed, ``draws`` of each; the inputs themselves where neither is possible."""
    every: dict[int, Tensor] = {}
    count = batch_size(batch)
    if not count:
        return examples_of(floats, entering(batch), count)
    for draw in range(draws):
        other = changed(batch, changes, generator)
        mix = mixed_pairs([other], generator)
        if mix is None and not changes:
            return examples_of(floats, entering(batch), count)
        values = entering(other if mix is None else mix[0])
        every = every or {number: room_for(draws * len(x), x) for number, x in values.items()}
        for number, x in values.items():
            every[number][draw * len(x) : (draw + 1) * len(x)] = x
    return examples_of(floats, every, draws * count)


@torch.no_grad()
def _spreads(
    ready: Prepared, program: Program, state: dict[str, Tensor], values: dict[int, Tensor]
) -> dict[str, Tensor]:
    """The standard deviation of every layer's output, by channel."""
    calls = {name: program.calls[name][0] for name in ready.quantizable}
    at = {replace(call.key, output=0): name for name, call in calls.items()}
    spreads = {}

    def see(place: OpKey, output: Tensor) -> Tensor:
        if (name := at.get(place)) is not None:
            channels_last = output.movedim(1, -1) if program.kinds[name].startswith("conv") else output
            rows = as_rows if ready.padding is None else ready.padding.rows_of(calls[name].output, values)
            spreads[name] = rows(channels_last).std(0)
        return output

    program.replay(values, state, [program.output], see)
    return spreads


def reconstruct(
    reconstruction: ReconstructionPlan, simulated: SimulatedModel, how: str, progress: bool, kept: Cache
) -> dict[str, Learned]:
    """Learn as asked ("block" learns the blocks first, then the network; AdaQuant layer by layer); returns the loss on
    held-back inputs before and after each step of it. What is ``kept`` is not learned again.
    """
    runner, found = reconstruction.on(simulated), dict[str, Learned]()
    if how in ADAQUANT:
        # layers learn to be like the float ones, not the output: kept where the network as a whole gains
        layers = partial(_learn_layers, reconstruction, runner, how == "adaquant-parallel", progress, kept, found)
        learned = _where_it_helps(reconstruction, simulated, layers)
        notice(f"learned layer by layer: damage on held-back inputs {learned.before:.4g} -> {learned.after:.4g}")
        return found | {"network": learned}
    blocks, (of_block, schedule) = reconstruction.recording.blocks, reconstruction.schedules
    training = reconstruction.training(of_block, progress, kept)
    if how == "block" and len(blocks) > 1:
        in_order = partial(_learn_blocks, reconstruction, runner, training, found)
        if reconstruction.positions:
            found[EVERY_BLOCK] = _where_it_helps(reconstruction, simulated, in_order)
        else:
            in_order()
    # codes that blocks have learned stay: the network learns scales and biases, too few to be learned by heart
    if found and not reconstruction.positions:
        schedule = replace(schedule, code_rate=0.0, averaging=reconstruction.learning.averaging)
    training = replace(training, schedule=schedule)
    work = partial(learn_network, runner, reconstruction.reference, reconstruction.data, training)
    found["network"] = learned = kept.learned("network", simulated, simulated.weights, work)
    notice(f"learned: softened damage on held-back inputs {learned.before:.4g} -> {learned.after:.4g}")
    return found


def _learn_layers(
    plan: ReconstructionPlan,
    runner: SimulatedProgram,
    parallel: bool,
    progress: bool,
    kept: Cache,
    found: dict[str, Learned],
) -> None:
    """Learn layer by layer, and add to what was ``found``."""
    (data,), blocks = plan.block_data, plan.recording.blocks
    few, training = data.first(plan.learning.layer_samples), plan.training(plan.learning.layer, progress, kept)
    found.update(learn_layers(runner, plan.reference, few, blocks, training, parallel))


def _learn_blocks(
    plan: ReconstructionPlan, runner: SimulatedProgram, training: Training, found: dict[str, Learned]
) -> None:
    """Learn block by block, and add to what was ``found``."""
    found.update(learn_blocks(runner, plan.reference, plan.block_data, plan.recording.blocks, training))


def correct(
    reconstruction: ReconstructionPlan, simulated: SimulatedModel, how: str, progress: bool, kept: Cache
) -> dict[str, Learned]:
    """Apply a correction ("auto": all but "confidence" in turn), each kept only where the damage on held-back inputs
    falls; returns that damage before and after each.
    """
    runner = reconstruction.on(simulated)
    training = reconstruction.training(reconstruction.learning.tuning, progress, kept)
    helping = partial(_where_it_helps, reconstruction, simulated)
    every: dict[str, Callable[[], Learned]] = {
        "norm": partial(helping, partial(_match, reconstruction, runner, deviations=True)),
        "bias": partial(helping, partial(_match, reconstruction, runner, deviations=False)),
        "tuning": partial(
            learn_network, runner, reconstruction.reference, reconstruction.data, training, only_biases=True
        ),
        "confidence": partial(helping, partial(_temper, reconstruction, runner)),
    }
    return {
        name: kept.learned(f"correction {name}", simulated, simulated.weights, work)
        for name, work in every.items()
        if how == name or (how == "auto" and name in AUTO)
    }


def _where_it_helps(
    reconstruction: ReconstructionPlan, simulated: SimulatedModel, change: Callable[[], None]
) -> Learned:
    """Change a model, and undo it unless that lowers the damage on held-back inputs."""
    runner, kept, reference = reconstruction.on(simulated), Snapshot.of(simulated), reconstruction.reference
    floats = float_program(simulated.model, runner.program, reference.state)
    held_back = partial(mean_damage, runner, floats, reconstruction.held, reference.damage)
    before = held_back()
    change()
    after = held_back()
    if not after < before:
        kept.put_back(simulated)
    return Learned(before, min(before, after))


def _match(reconstruction: ReconstructionPlan, runner: SimulatedProgram, deviations: bool) -> None:
    """Match statistics of the outputs."""
    most = reconstruction.learning.statistics_samples
    some = [data.seen.first(most).inputs for data in reconstruction.data]
    floats = float_program(runner.model.model, runner.program, reconstruction.reference.state)
    match_outputs(runner, floats, reconstruction.recording.blocks, some, deviations)


def _temper(reconstruction: ReconstructionPlan, runner: SimulatedProgram) -> None:
    """Make the logits as large as is best for the damage on held-back inputs."""
    head, reference = head_of(runner), reconstruction.reference
    if head is None or not reconstruction.logits:
        return
    floats, every = float_program(runner.model.model, runner.program, reference.state), whole(runner.program)
    outputs = [[play_output(one, held.inputs, every) for one in (floats, runner)] for held in reconstruction.held]

    def damage(factor: float) -> float:
        pairs = zip(outputs, reconstruction.held, strict=True)
        rows = [reference.damage(wanted, factor * found, held.inputs) for (wanted, found), held in pairs]
        return float(torch.cat(rows).double().mean())

    factor = best_factor(damage)
    scale_layer(runner.model, head, factor)
    notice(f"logits times {factor:.2f}")


def require_reconstruction(planned: ReconstructionPlan | str, /, **asked: str) -> ReconstructionPlan | None:
    """The reconstruction; without one, None where all that was ``asked`` is "auto" or "none", with a notice, otherwise
    InvalidRequest.
    """
    if isinstance(planned, ReconstructionPlan):
        if len(planned.data) > 1 and asked.get("reconstruction") in ADAQUANT:
            raise InvalidRequest(
                f"reconstruction={asked['reconstruction']!r} learns from samples of one size, and the calibration "
                f"data has {len(planned.data)}. Use 'block', or inputs of one size."
            )
        return planned
    for key, value in asked.items():
        if value not in ("auto", "none"):
            raise InvalidRequest(f"{key}={value!r} cannot learn this model: {planned}. Use 'none'.")
    notice(f"nothing is learned after rounding: {planned}")
    return None
