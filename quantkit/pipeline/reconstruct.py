"""Learning after rounding: what to learn from, whether it is worth it, and how the result compares on inputs that were
held back.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from quantkit.errors import InvalidRequest
from quantkit.graph.batches import Batch, batch_size
from quantkit.graph.segments import Segment, blocks_of, whole
from quantkit.graph.tape import Tape, record
from quantkit.progress import notice
from quantkit.quantizers.learning import Learned, Schedule
from quantkit.quantizers.playback import Playback, play, state_of
from quantkit.quantizers.reconstruction import Lesson, Teacher, learn_blocks, learn_network
from quantkit.quantizers.simulate import SimulatedModel
from quantkit.sensitivity.inputs import mixed_pairs
from quantkit.sensitivity.measure import Damage, main_output, rows_of
from quantkit.transforms.prepare import Prepared

LEAST_SAMPLES = 64  # with fewer, what is learned is the samples
HELD_BACK = 8  # one in so many
DRAWS = 4  # mixes of each sample
DRAWN_BYTES = 1 << 28
WORTH_LEARNING = 5  # bits of a weight: above, rounding alone is as good
NETWORK = Schedule()
BLOCK = Schedule(steps=150)


@dataclass(frozen=True)
class Course:
    """Everything learning needs from the float model, kept before its weights are rounded."""

    tape: Tape
    teacher: Teacher
    lesson: Lesson
    blocks: list[Segment]
    seed: int


def worth_learning(weight_bits: Collection[int], site_bits: Collection[int], batches: Sequence[Batch]) -> bool:
    """What "auto" decides by: codes of few bits, and samples enough not to learn them by heart."""
    narrow = min(weight_bits, default=8) <= WORTH_LEARNING or min(site_bits, default=8) < 8
    return narrow and sum(map(batch_size, batches)) >= LEAST_SAMPLES


def course_of(ready: Prepared, batches: Sequence[Batch], damage: Damage, seed: int) -> Course | str:
    """The course of a model that is still float, or why there is none."""
    generator = torch.Generator().manual_seed(seed)
    stacked = _stacked(batches)
    if stacked is None:
        return "its inputs cannot be put into batches of one size"
    count = batch_size(stacked)
    held = max(2, count // HELD_BACK)
    if count - held < 2:
        return f"{count} samples are too few"
    order = torch.randperm(count, generator=generator)
    training, testing = _samples(stacked, order[held:]), _samples(stacked, order[:held])
    size = min(NETWORK.batch, count - held)
    examples = _samples(training, torch.arange(size)), _samples(training, torch.arange(-size, 0))
    tape = record(ready.model, *examples, main_output)
    if tape is None:
        return "what it computes depends on more than its inputs' values and batch size"
    state = {name: tensor.clone() for name, tensor in state_of(ready.model).items()}
    teacher = Teacher(
        state,
        _spreads(ready, tape, state, tape.entering(ready.model, examples[0])),
        lambda wanted, found: damage.smooth_rows(rows_of(wanted), rows_of(found)),
        lambda output, draw: (damage.cotangent(rows_of(output).detach(), draw) * rows_of(output)).sum(),
    )
    inputs = tape.entering(ready.model, _drawn(training, generator))
    held_inputs = tape.entering(ready.model, _drawn(testing, generator))
    floats = Playback(SimulatedModel(ready.model, (), {}, {}), tape, fixed=state)
    every = whole(tape, ())
    lesson = Lesson(inputs, play(floats, inputs, every), held_inputs, play(floats, held_inputs, every))
    blocks = blocks_of(tape, ready.trace, ready.quantizable, {site.place for site in ready.sites})
    return Course(tape, teacher, lesson, blocks, seed)


def _stacked(batches: Sequence[Batch]) -> Batch | None:
    """All samples as one batch, where every argument is a tensor with a row per sample."""
    flat = [tree_flatten(batch) for batch in batches]
    columns = list(zip(*(leaves for leaves, _ in flat), strict=False))
    sizes = [batch_size(batch) for batch in batches]
    same = all(spec == flat[0][1] for _, spec in flat)
    if not same or not all(_is_column(column, sizes) for column in columns):
        return None
    return tree_unflatten([torch.cat(list(column)) for column in columns], flat[0][1])


def _is_column(column: Sequence[Any], sizes: Sequence[int]) -> bool:
    tensors = [t for t in column if isinstance(t, Tensor) and t.dim()]
    return (
        len(tensors) == len(column)
        and [len(t) for t in tensors] == list(sizes)
        and len({(t.shape[1:], t.dtype) for t in tensors}) == 1
    )


def _samples(batch: Batch, indices: Tensor) -> Batch:
    return tree_map(lambda tensor: tensor[indices], batch)


def _drawn(batch: Batch, generator: torch.Generator) -> Batch:
    """Pair-mixed inputs, several draws of each where they are small; the inputs themselves where they do not mix."""
    bytes_each = sum(t.numel() * t.element_size() for t in tree_flatten(batch)[0])
    draws = max(1, min(DRAWS, DRAWN_BYTES // max(1, bytes_each)))
    mixes = [mixed_pairs([batch], generator) for _ in range(draws)]
    drawn = [mix[0] for mix in mixes if mix is not None]
    return tree_map(lambda *tensors: torch.cat(tensors), *drawn) if drawn else batch


@torch.no_grad()
def _spreads(ready: Prepared, tape: Tape, state: dict[str, Tensor], values: dict[int, Tensor]) -> dict[str, Tensor]:
    """The standard deviation of every layer's output, by channel."""
    at = {ready.trace.calls[name][0].key: name for name in ready.quantizable}
    made = {at[step.key]: step.makes[0] for step in tape.steps if step.key in at}
    outputs = tape.replay(values, state, list(made.values()))
    spreads = {}
    for name, output in zip(made, outputs, strict=True):
        channels_last = output if ready.trace.kinds[name] == "linear" else output.movedim(1, -1)
        spreads[name] = channels_last.reshape(-1, channels_last.shape[-1]).std(0)
    return spreads


def reconstruct(course: Course, simulated: SimulatedModel, how: str, progress: bool) -> dict[str, Learned]:
    """Learn as asked ("block" learns the blocks first, then the network); returns the loss on held-back inputs before
    and after each step of it.
    """
    generator = torch.Generator().manual_seed(course.seed)
    playback = Playback(simulated, course.tape)
    found = {}
    if how == "block" and len(course.blocks) > 1:
        found = learn_blocks(playback, course.teacher, course.lesson, course.blocks, BLOCK, generator, progress)
    found["network"] = learn_network(playback, course.teacher, course.lesson, NETWORK, generator, progress)
    learned = found["network"]
    notice(f"learned: damage on held-back inputs {learned.before:.4g} -> {learned.after:.4g}")
    return found


def require_course(course: Course | str, asked: str) -> Course | None:
    """The course; without one, None for "auto" with a notice, InvalidRequest where learning was asked for."""
    if isinstance(course, Course):
        return course
    if asked != "auto":
        raise InvalidRequest(f"reconstruction={asked!r} cannot learn this model: {course}. Use 'none'.")
    notice(f"nothing is learned after rounding: {course}")
    return None
