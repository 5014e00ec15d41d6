"""Learning after rounding: what to learn from, whether it is worth it, and how the result compares on inputs that were
held back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from quantkit.errors import InvalidRequest
from quantkit.program.inputs import Batch, batch_size
from quantkit.program.program import Program
from quantkit.program.segments import whole
from quantkit.progress import notice
from quantkit.reconstruction.adaquant import learn_layers
from quantkit.reconstruction.augmentation import changed, harmless
from quantkit.reconstruction.blocks import FloatReference, ReconstructionData, learn_blocks, learn_network, mean_damage
from quantkit.reconstruction.corrections import best_factor, head_of, match_outputs, scale_layer
from quantkit.reconstruction.learning import Learned, Schedule
from quantkit.reconstruction.snapshot import Cache, Snapshot
from quantkit.sensitivity.damage import SOFTENED, Damage
from quantkit.sensitivity.inputs import mixed_pairs
from quantkit.simulation.model import SimulatedModel
from quantkit.simulation.playback import (
    CHUNK,
    SimulatedProgram,
    Values,
    copied_state,
    float_program,
    play_output,
    room_for,
)
from quantkit.stages.recording import Recording, some_samples
from quantkit.transforms.prepare import Prepared

LEAST_SAMPLES = 64  # with fewer, what is learned is the samples
HELD_BACK = 8  # one in so many
DRAWS = 16  # mixes of each sample for learning the network
FEW_DRAWS = 4  # for learning blocks, whose values all draws take room for, and of samples that are held back
CHANGED_SAMPLES = 256  # on which it is asked how harmless a change is
DRAWN_BYTES = 1 << 28
WORTH_LEARNING = 5  # bits of a weight: above, rounding alone is as good
WORTH_BLOCKS = 3  # and up to here it is worth the time to learn block by block first
NETWORK = Schedule(steps=900, batch=32, code_rate=3e-4, checks=12)
AVERAGING = 0.98  # where codes stay: a mean of codes that move rounds to codes that no step has tried
BLOCK = Schedule(steps=1200, batch=32, code_rate=3e-3)
LAYER = Schedule(steps=300, checks=20)
TUNING = Schedule(steps=100, bias_rate=3e-3)
STATISTICS_SAMPLES = 512
LAYER_SAMPLES = 1024
AUTO = ("norm", "bias", "tuning")  # corrections: how sure to be of unseen inputs, held-back ones say too vaguely
ADAQUANT = ("adaquant", "adaquant-parallel")


@dataclass(frozen=True)
class ReconstructionPlan:
    """Everything learning needs from the float model, kept before its weights are rounded. ``block_data``: the part
    of the data that blocks and layers learn from.
    """

    recording: Recording
    reference: FloatReference
    data: ReconstructionData
    block_data: ReconstructionData
    seed: int
    logits: bool  # whether outputs are logits, as far as the damage is concerned


def worth_learning(weight_bits: Collection[int], site_bits: Collection[int], batches: Sequence[Batch]) -> bool:
    """What "auto" decides by: codes of few bits, and samples enough not to learn them by heart."""
    narrow = min(weight_bits, default=8) <= WORTH_LEARNING or min(site_bits, default=8) < 8
    return narrow and sum(map(batch_size, batches)) >= LEAST_SAMPLES


def method_to_learn(how: str, weight_bits: Collection[int], site_bits: Collection[int]) -> str:
    """What is learned when asked for ``how``: for "auto" blocks first, then the network, where codes are narrowest,
    and the network alone elsewhere.
    """
    narrowest = min(weight_bits, default=8) <= WORTH_BLOCKS or min(site_bits, default=8) < 8
    return how if how != "auto" else "block" if narrowest else "network"


def plan_reconstruction(
    ready: Prepared, recording: Recording | str, damage: Damage, seed: int
) -> ReconstructionPlan | str:
    """The reconstruction of a model that is still float, or why there is none."""
    if isinstance(recording, str):
        return recording
    generator, program = torch.Generator().manual_seed(seed), recording.program
    count = batch_size(recording.samples)
    held = max(2, count // HELD_BACK)
    if count - held < 2:
        return f"{count} samples are too few"
    order = torch.randperm(count, generator=generator)
    training, testing = some_samples(recording.samples, order[held:]), some_samples(recording.samples, order[:held])
    reference = _reference(ready, program, damage, some_samples(training, torch.arange(CHUNK)))
    floats, every = float_program(ready.model, program, reference.state), whole(program)

    def outputs(batch: Batch) -> Tensor:
        return play_output(floats, program.entering(ready.model, batch), every)

    few = some_samples(training, torch.arange(min(CHANGED_SAMPLES, count - held)))
    changes = harmless(few, outputs, reference.damage, generator)
    if changes:
        notice(f"learning from images that are also {' and '.join(changes)}: the float outputs hardly change")
    inputs, held_inputs = (
        _drawn(program, ready.model, part, changes, most, generator)
        for part, most in ((training, DRAWS), (testing, FEW_DRAWS))
    )
    data = ReconstructionData(
        inputs, play_output(floats, inputs, every), held_inputs, play_output(floats, held_inputs, every)
    )
    few_draws = data.first(FEW_DRAWS * (count - held))
    return ReconstructionPlan(recording, reference, data, few_draws, seed, damage.main.softens)


def _reference(ready: Prepared, program: Program, damage: Damage, few: Batch) -> FloatReference:
    """The float network, with the spread of its layers' outputs on a few samples."""
    state, measure, rows = copied_state(program, ready.model), damage.main, damage.rule.answer.rows
    return FloatReference(
        state,
        {name: ready.weights[name].detach().clone() for name in ready.quantizable},
        _spreads(ready, program, state, program.entering(ready.model, few)),
        lambda wanted, found: measure.rows(rows(wanted), rows(found)),
        lambda wanted, found: measure.smooth_rows(rows(wanted), rows(found), SOFTENED),
        lambda output, draw: (measure.cotangent(rows(output).detach(), draw) * rows(output)).sum(),
    )


def _drawn(
    program: Program, model: nn.Module, batch: Batch, changes: Sequence[str], most: int, generator: torch.Generator
) -> Values:
    """Inputs with these changes and pair-mixed, up to ``most`` draws of each where they are small; the inputs
    themselves where neither is possible.
    """
    bytes_each = sum(t.numel() * t.element_size() for t in tree_flatten(batch)[0])
    draws = max(1, min(most, DRAWN_BYTES // max(1, bytes_each)))
    every: Values = {}
    for draw in range(draws):
        other = changed(batch, changes, generator)
        mix = mixed_pairs([other], generator)
        if mix is None and not changes:
            return program.entering(model, batch)
        values = program.entering(model, other if mix is None else mix[0])
        every = every or {number: room_for(draws * len(x), x) for number, x in values.items()}
        for number, x in values.items():
            every[number][draw * len(x) : (draw + 1) * len(x)] = x
    return every


@torch.no_grad()
def _spreads(
    ready: Prepared, program: Program, state: dict[str, Tensor], values: dict[int, Tensor]
) -> dict[str, Tensor]:
    """The standard deviation of every layer's output, by channel."""
    at = {program.calls[name][0].key: name for name in ready.quantizable}
    made = {at[step.key]: step.makes[0] for step in program.steps if step.key in at}
    outputs = program.replay(values, state, list(made.values()))
    spreads = {}
    for name, output in zip(made, outputs, strict=True):
        channels_last = output.movedim(1, -1) if program.kinds[name].startswith("conv") else output
        spreads[name] = channels_last.reshape(-1, channels_last.shape[-1]).std(0)
    return spreads


def reconstruct(
    reconstruction: ReconstructionPlan, simulated: SimulatedModel, how: str, progress: bool, kept: Cache
) -> dict[str, Learned]:
    """Learn as asked ("block" learns the blocks first, then the network); returns the loss on held-back inputs before
    and after each step of it. What is ``kept`` is not learned again.
    """
    if how in ADAQUANT:
        return _by_layers(reconstruction, simulated, how == "adaquant-parallel", progress, kept)
    generator = torch.Generator().manual_seed(reconstruction.seed)
    runner, blocks = SimulatedProgram(simulated, reconstruction.recording.program), reconstruction.recording.blocks
    found = {}
    if how == "block" and len(blocks) > 1:
        found = learn_blocks(
            runner, reconstruction.reference, reconstruction.block_data, blocks, BLOCK, generator, progress, kept
        )
    # codes that blocks have learned stay: the network learns scales and biases, too few to be learned by heart
    schedule = replace(NETWORK, code_rate=0.0, averaging=AVERAGING) if found else NETWORK
    work = partial(learn_network, runner, reconstruction.reference, reconstruction.data, schedule, generator, progress)
    found["network"] = kept.learned("network", simulated, simulated.weights, work)
    learned = found["network"]
    notice(f"learned: softened damage on held-back inputs {learned.before:.4g} -> {learned.after:.4g}")
    return found


def _by_layers(
    reconstruction: ReconstructionPlan,
    simulated: SimulatedModel,
    parallel: bool,
    progress: bool,
    finished: Cache,
) -> dict[str, Learned]:
    """AdaQuant, kept where the network as a whole gains: layers learn to be like the float ones, not the output."""
    program, data = reconstruction.recording.program, reconstruction.data
    generator = torch.Generator().manual_seed(reconstruction.seed)
    runner, kept = SimulatedProgram(simulated, program), Snapshot.of(simulated)
    before = mean_damage(runner, data.held_inputs, data.held_outputs, reconstruction.reference.damage)
    few = reconstruction.block_data.first(LAYER_SAMPLES)
    found = learn_layers(
        runner, float_program(simulated.model, program, reconstruction.reference.state), reconstruction.reference, few,
        reconstruction.recording.blocks, LAYER, generator, parallel, progress, finished,
    )  # fmt: skip
    after = mean_damage(runner, data.held_inputs, data.held_outputs, reconstruction.reference.damage)
    if not after < before:
        kept.put_back(simulated)
    notice(f"learned layer by layer: damage on held-back inputs {before:.4g} -> {min(before, after):.4g}")
    return found | {"network": Learned(before, min(before, after))}


def correct(
    reconstruction: ReconstructionPlan, simulated: SimulatedModel, how: str, progress: bool, kept: Cache
) -> dict[str, Learned]:
    """Apply a correction ("auto": all but "confidence" in turn), each kept only where the damage on held-back inputs
    falls; returns that damage before and after each.
    """
    tuning = partial(
        learn_network, SimulatedProgram(simulated, reconstruction.recording.program), reconstruction.reference,
        reconstruction.data, TUNING, torch.Generator().manual_seed(reconstruction.seed), progress, only_biases=True,
    )  # fmt: skip
    every: dict[str, Callable[[], Learned]] = {
        "norm": partial(_match, reconstruction, simulated, deviations=True),
        "bias": partial(_match, reconstruction, simulated, deviations=False),
        "tuning": tuning,
        "confidence": partial(_temper, reconstruction, simulated),
    }
    return {
        name: kept.learned(f"correction {name}", simulated, simulated.weights, work)
        for name, work in every.items()
        if how == name or (how == "auto" and name in AUTO)
    }


def _match(reconstruction: ReconstructionPlan, simulated: SimulatedModel, deviations: bool) -> Learned:
    """Match statistics of the outputs where that lowers the damage on held-back inputs."""
    program, data, damage = reconstruction.recording.program, reconstruction.data, reconstruction.reference.damage
    runner, floats = (
        SimulatedProgram(simulated, program),
        float_program(simulated.model, program, reconstruction.reference.state),
    )
    kept = Snapshot.of(simulated)
    before = mean_damage(runner, data.held_inputs, data.held_outputs, damage)
    some = data.first(STATISTICS_SAMPLES).inputs
    match_outputs(runner, floats, reconstruction.recording.blocks, some, deviations)
    after = mean_damage(runner, data.held_inputs, data.held_outputs, damage)
    if not after < before:
        kept.put_back(simulated)
    return Learned(before, min(before, after))


def _temper(reconstruction: ReconstructionPlan, simulated: SimulatedModel) -> Learned:
    """Make the logits as large as is best for the damage on held-back inputs."""
    program, data, damage = reconstruction.recording.program, reconstruction.data, reconstruction.reference.damage
    runner = SimulatedProgram(simulated, program)
    before = mean_damage(runner, data.held_inputs, data.held_outputs, damage)
    head = head_of(runner)
    if head is None or not reconstruction.logits:
        return Learned(before, before)
    kept = Snapshot.of(simulated)
    found = play_output(runner, data.held_inputs, whole(program))
    factor = best_factor(found, lambda outputs: damage(data.held_outputs, outputs))
    scale_layer(simulated, head, factor)
    after = mean_damage(runner, data.held_inputs, data.held_outputs, damage)
    if not after < before:
        kept.put_back(simulated)
        return Learned(before, before)
    notice(f"logits times {factor:.2f}: damage on held-back inputs {before:.4g} -> {after:.4g}")
    return Learned(before, after)


def require_reconstruction(planned: ReconstructionPlan | str, /, **asked: str) -> ReconstructionPlan | None:
    """The reconstruction; without one, None where all that was ``asked`` is "auto" or "none", with a notice, otherwise
    InvalidRequest.
    """
    if isinstance(planned, ReconstructionPlan):
        return planned
    for key, value in asked.items():
        if value not in ("auto", "none"):
            raise InvalidRequest(f"{key}={value!r} cannot learn this model: {planned}. Use 'none'.")
    notice(f"nothing is learned after rounding: {planned}")
    return None
