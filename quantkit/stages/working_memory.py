"""What rounding and learning will hold, and how long they will take, known before either begins."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from quantkit.program.inputs import batch_size, first_samples
from quantkit.program.program import Program
from quantkit.program.segments import Segment, between_layers, whole
from quantkit.ranges.statistics import hessian_bytes
from quantkit.reconstruction.data import HELD_BYTES
from quantkit.reconstruction.learning import Schedule
from quantkit.rounding import rounding_of
from quantkit.rounding.request import RoundingOptions
from quantkit.sensitivity.kronecker import GRAPH_ROWS
from quantkit.simulation.playback import SPILL_BYTES, differentiated_at_once, played_at_once
from quantkit.stages.footprint import (
    by_loss_bytes,
    collecting_bytes,
    counting_bytes,
    fitting,
    forward_bytes,
    resident_bytes,
    rounding_bytes,
    rounding_seconds,
    together,
    value_bytes,
)
from quantkit.stages.forecast import forward_seconds
from quantkit.stages.formatted import Formatted
from quantkit.stages.inputs import BATCH
from quantkit.stages.machine import machine, range_seconds
from quantkit.stages.options import ApplyOptions
from quantkit.stages.recording import Recording

_DRAWING = 9  # copies of the samples: recorded, divided, and one draw while it is changed, mixed and laid out
_COPIES = 2  # of parameters: codes, and weights as they are read
_LEARNED_COPIES = 9  # learned: float, computed with, their gradients, two of Adam, mean, present and best
_GRAPH = 5  # what a gradient keeps of a value: itself, scaled, rounded and quantized, and its own gradient
_FLOAT_GRAPH = 2  # of a value that no site quantizes: itself, and its own gradient
_PASSES = 10  # of a quantized model: four to count values for ranges, two to round, four to time and compare
_STEP = 3  # forwards of a batch that a step of learning takes, its gradient included
_LEARNED = 0.05  # of what rounding a weight takes: a step of learning it


@dataclass(frozen=True)
class Learning:
    """What will be learned: the network from ``network`` samples, by blocks from ``blocks`` ones, of which ``held``
    are held back, each by a schedule; 0 samples where nothing is learned so.
    """

    network: int = 0
    blocks: int = 0
    held: int = 0
    schedules: tuple[Schedule, ...] = ()


@dataclass(frozen=True)
class WorkingMemory:
    """Bytes beyond the model and its calibration inputs: ``ranges`` while the values of sites are counted; ``values``
    between layers, or that enter and leave one block, for all samples, ``drawing`` what is learned from (freed before
    learning, but a process seldom gives small pieces back), ``hessian`` of the largest layer, ``graph`` of one batch
    while it is differentiated; ``by_loss`` what rounding by the network's loss is found from, before the others; and
    ``copies`` of the model's state.
    """

    ranges: int
    values: int
    drawing: int
    hessian: int
    graph: int
    copies: int
    by_loss: int = 0

    @property
    def peak_bytes(self) -> int:
        working = max(self.ranges, self.values + self.drawing + max(self.hessian, self.graph))
        return self.copies + self.by_loss + working

    def __str__(self) -> str:
        return (
            f"rounding and learning: memory at most about {self.peak_bytes / 1e6:,.0f} MB beyond the model and its "
            f"inputs, {self.values / 1e6:,.0f} MB of them values between layers and blocks; a single value beyond "
            f"{SPILL_BYTES / 1e6:,.0f} MB goes to disk"
        )


def working_memory(
    formatted: Formatted, recording: Recording, samples: int, learning: Learning, options: RoundingOptions
) -> WorkingMemory:
    """The working memory of rounding on ``samples`` and of ``learning``.

    Rounding holds what is read from a layer on. Learning holds what enters it in the quantized and in
    the float network, what leaves it in both, and what is wanted.
    """
    program, ready = recording.program, formatted.ready
    sizes, chunk = value_bytes(program, 1), min(samples, played_at_once(program))
    enters = max(together(sizes, block.entering) for block in recording.blocks)
    leaves = max(_leaving(sizes, program, block, learning.blocks) for block in recording.blocks)
    inputs = together(sizes, program.inputs)
    held = max(together(sizes, segment.entering) for segment in between_layers(program, ready.quantizable))
    values = max(samples * held, learning.network * inputs + learning.blocks * (2 * enters + 3 * leaves))
    state = sum(t.numel() * t.element_size() for t in ready.model.state_dict().values())
    learned = learning.network + learning.blocks > 0
    forward = forward_bytes(program, chunk)
    copied = _GRAPH if formatted.sites else _FLOAT_GRAPH
    graph = copied * learned * _made(program, min(chunk, differentiated_at_once(program, whole(program))))
    if rounding_of(options.name).fisher:
        rows = math.prod(program.shape[program.output][:-1]) // program.size
        graph = max(graph, _made(program, min(samples, max(1, GRAPH_ROWS // max(1, rows)))))
    hessian = max(_rounding(formatted, name, chunk, forward, options) for name in ready.quantizable)
    by_loss = by_loss_bytes(program, ready.quantizable, options)
    copies = (_LEARNED_COPIES if learned else _COPIES) * state
    batch = max(map(batch_size, formatted.batches), default=BATCH)
    ranges = counting_bytes(program, min(samples, batch))
    return WorkingMemory(ranges, values, _DRAWING * samples * inputs * learned, hessian, graph, copies, by_loss)


def _made(program: Program, samples: int) -> int:
    """Bytes of all that a forward of so many samples makes."""
    sizes = value_bytes(program, samples)
    return sum(resident_bytes(sizes[number]) for number in program.producer)


def _leaving(sizes: Mapping[int, int], program: Program, block: Segment, samples: int) -> int:
    """Bytes of what leaves a block for one sample; none where that are large outputs of the network, not held."""
    each = together(sizes, block.leaving)
    return 0 if block.output == program.output and samples * each > HELD_BYTES else each


@dataclass(frozen=True)
class Expected:
    """What rounding and learning will take, with the ``rounding`` that keeps to the memory that may be taken."""

    memory: WorkingMemory
    seconds: float
    rounding: RoundingOptions

    def __str__(self) -> str:
        return f"{self.memory}; about {self.seconds:.0f} s of the processor"


def expected_work(formatted: Formatted, recording: Recording, options: ApplyOptions, learning: Learning) -> Expected:
    """What rounding as the ``options`` say, and ``learning``, will take."""
    samples = sum(map(batch_size, formatted.batches))

    def memory(rounding: RoundingOptions) -> WorkingMemory:
        return working_memory(formatted, recording, samples, learning, rounding)

    rounding = fitting(options.memory, RoundingOptions(options.rounding), lambda asked: memory(asked).peak_bytes)
    return Expected(memory(rounding), working_seconds(formatted, learning, rounding), rounding)


def _rounding(formatted: Formatted, layer: str, chunk: int, forward: int, options: RoundingOptions) -> int:
    """Bytes that rounding a layer takes, with the forward that shows its inputs."""
    options = formatted.rounding(layer, options)
    ready, most, method = formatted.ready, options.hessian_bytes, rounding_of(options.name)
    weight = ready.weights.layers[layer]
    found = rounding_bytes(weight, options)
    if not (method.hessian and weight.inputs_seen):
        return found
    both = hessian_bytes(weight, most) * method.cross  # the products with the inputs of the float network
    seen = hessian_bytes(weight, most) + collecting_bytes(ready.program, layer, chunk, most) + forward
    return both + max(found, seen)


def working_seconds(formatted: Formatted, learning: Learning, options: RoundingOptions) -> float:
    """Seconds of the processor for rounding, and for ``learning``, from timing one batch."""
    ready, batches = formatted.ready, formatted.batches
    samples, batch = sum(map(batch_size, batches)), max(batches, key=batch_size)
    plain, quantized = (x / batch_size(batch) for x in forward_seconds(ready, batch))
    rounding = sum(
        rounding_seconds(ready.program, n, 1, samples, formatted.rounding(n, options)) for n in ready.quantizable
    )
    found = _PASSES * samples * quantized + len(ready.sites) * range_seconds() + rounding
    if not learning.schedules:
        return found
    weights = sum(math.prod(ready.weights.layers[name].shape) for name in ready.quantizable)
    few = first_samples(batch, learning.schedules[0].batch)
    step = _STEP * forward_seconds(ready, few)[1] + _LEARNED * weights * machine(options.name).weight
    for schedule in learning.schedules:
        found += schedule.steps * step + schedule.checks * learning.held * quantized
    return found + learning.network * plain
