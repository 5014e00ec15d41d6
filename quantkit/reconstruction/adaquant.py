"""AdaQuant: a layer's weight, its scales and zero points, its bias and the range of its input learned together, by the
squared error of the layer's output.

Hubara et al., "Improving Post Training Neural Quantization" (arXiv 2006.10518), section 3: minimize, over V, s_w, z_w,
s_x, z_x and b', || f(W X + b) - f(Q_w(W + V) Q_x(X) + b') ||^2, f the activation behind the layer, gradients passed
through rounding. *Parallel*: X are the float network's inputs, layers do not depend on each other. *Sequential*: each
layer gets what the network quantized so far makes of them, and is to give what the float network gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from quantkit.numbers.uniform import QuantizedWeight
from quantkit.program.codes import root_of
from quantkit.program.intercept import OpKey, read_place
from quantkit.program.program import Program
from quantkit.program.segments import Segment
from quantkit.progress import track
from quantkit.reconstruction.blocks import settle
from quantkit.reconstruction.data import FloatReference, ReconstructionData
from quantkit.reconstruction.learned import LearnedRange, LearnedWeight, round_through
from quantkit.reconstruction.learning import Rated, Schedule, Training, learn
from quantkit.reconstruction.snapshot import Learned
from quantkit.simulation.playback import SimulatedProgram, Values, float_program, in_chunks, play, play_output

ACTIVATIONS = ("relu", "relu_", "relu6", "hardtanh", "hardtanh_", "clamp", "clip")
LEAST_SPREAD = 1e-12


class JointWeight(LearnedWeight):
    """A layer's weight and bias with zero points that are learned too, where its format has them."""

    def __init__(self, weight: Tensor, start: QuantizedWeight, bias: Tensor | None, unit: Tensor) -> None:
        super().__init__(weight, start, bias, unit)
        self.zero_shift = torch.zeros_like(self.zero, requires_grad=start.zero_point is not None)

    def zeros(self) -> Tensor:
        return round_through(self.zero + self.zero_shift).clamp(*self.start.format.code_range)

    def rated(self, schedule: Schedule) -> list[Rated]:
        joint = [(self.zero_shift, schedule.code_rate)] if self.zero_shift.requires_grad else []
        return [*super().rated(schedule), *joint]

    @torch.no_grad()
    def found(self) -> QuantizedWeight:
        kept = super().found()
        zero = self.zeros().squeeze(-1).to("cpu", torch.int8)
        return kept if kept.zero_point is None else replace(kept, zero_point=zero)


@dataclass(frozen=True)
class TaskCall:
    """Steps ``start`` to ``stop`` of a program, a layer and the activation behind it: the numbers of the value it
    reads and of the one it makes, and the site that quantizes the former with its place, if any. ``beside`` are the
    others that it reads and that the program makes: weights and biases that are computed.
    """

    start: int
    stop: int
    reads: int
    makes: int
    site: str | None
    place: OpKey | None
    beside: tuple[int, ...] = ()

    @property
    def segment(self) -> Segment:
        """The steps, and what they read and make."""
        return Segment(self.start, self.stop, (self.reads, *self.beside), (self.makes,), self.makes)


@dataclass(frozen=True)
class Task:
    """What a layer's call reads before its site quantizes it, and what it is to make: to learn from, and held back.
    ``beside`` has the values that it reads for all samples.
    """

    call: TaskCall
    inputs: Tensor
    wanted: Tensor
    held_inputs: Tensor
    held_wanted: Tensor
    beside: Values = field(default_factory=dict)

    @property
    def unit(self) -> Tensor:
        """The mean square of what is wanted around its mean: errors are measured in it."""
        return self.wanted.var().clamp(min=LEAST_SPREAD)


def calls_of(runner: SimulatedProgram, block: Segment, name: str) -> Iterator[TaskCall]:
    """The calls of a layer inside its block."""
    program = runner.program
    calls = {call.key: call for call in program.calls[name]}
    for i in range(block.start, block.stop):
        step = program.steps[i]
        if step.key not in calls:
            continue
        fused = i + 1 < block.stop and _is_activation_of(program, i)
        last = program.steps[i + 1] if fused else step
        place = program.producer.get(root_of(program, calls[step.key].input))
        place = own if (own := read_place(step.key)) in runner.sites else place
        site = None if place is None else runner.sites.get(place)
        stop, known = i + 2 if fused else i + 1, {step.inputs[0], *step.makes, *program.names, *program.constants}
        beside = {number for one in program.steps[i:stop] for number in one.inputs} - known
        yield TaskCall(i, stop, step.inputs[0], last.makes[0], site, place, tuple(sorted(beside)))


def _is_activation_of(program: Program, i: int) -> bool:
    """Whether the step after number ``i`` is an activation that alone reads what it makes, or overwrites it."""
    made, after = program.steps[i].makes[0], program.steps[i + 1]
    if after.key.op not in ACTIVATIONS or after.inputs[:1] != (made,):
        return False
    others = [other for other in program.steps if other is not after and made in other.inputs]
    overwrites = any(old == made for old, _ in after.rewrites)
    return overwrites or (not others and made != program.output)


@torch.no_grad()
def _entering(
    runner: SimulatedProgram, block: Segment, call: TaskCall, values: Values
) -> tuple[Tensor, dict[int, Tensor]]:
    """What a call reads, without the quantizer of its own site, and what it reads beside."""
    before, numbers = block.until(call.start, call.reads), (call.reads, *call.beside)
    chunks = [runner.inside(part, before, numbers, call.place) for part, _ in in_chunks(runner.program, values)]
    return torch.cat([read for read, *_ in chunks]), dict(zip(call.beside, chunks[-1][1:], strict=True))


@torch.no_grad()
def _leaving(floats: SimulatedProgram, block: Segment, call: TaskCall, values: Values) -> Tensor:
    """What a call makes in the float network."""
    return play_output(floats, values, block.until(call.stop, call.makes))


@dataclass(frozen=True)
class Streams:
    """The values that enter a block in the quantized and in the float network, to learn from and held back."""

    ours: Values
    theirs: Values
    held_ours: Values
    held_theirs: Values

    def after(self, runner: SimulatedProgram, floats: SimulatedProgram, block: Segment, parallel: bool) -> Streams:
        """Those that leave it."""
        theirs, held_theirs = (play(floats, v, block) for v in (self.theirs, self.held_theirs))
        if parallel:
            return Streams(theirs, theirs, held_theirs, held_theirs)
        ours, held_ours = (play(runner, v, block) for v in (self.ours, self.held_ours))
        return Streams(ours, theirs, held_ours, held_theirs)


def _tasks(
    source: SimulatedProgram, floats: SimulatedProgram, block: Segment, calls: Sequence[TaskCall], streams: Streams
) -> list[Task]:
    """The tasks of a layer's calls, on what ``source`` makes of what enters its block."""

    def task(call: TaskCall) -> Task:
        inputs, beside = _entering(source, block, call, streams.ours)
        held_inputs, _ = _entering(source, block, call, streams.held_ours)
        wanted, held_wanted = (_leaving(floats, block, call, v) for v in (streams.theirs, streams.held_theirs))
        return Task(call, inputs, wanted, held_inputs, held_wanted, beside)

    return [task(call) for call in calls]


def _goes_by_rows(program: Program, call: TaskCall) -> bool:
    """Whether a call reads and makes a row per sample, and nothing else that varies."""
    rows = program.rows
    return rows.get(call.reads) == rows.get(call.makes) == 0 and program.varying.isdisjoint(call.beside)


def learn_layers(
    runner: SimulatedProgram,
    reference: FloatReference,
    data: ReconstructionData,
    blocks: Sequence[Segment],
    training: Training,
    parallel: bool = False,
) -> dict[str, Learned]:
    """Learn the quantized layers in order; returns the error on held-back inputs of each before and after, relative to
    the variance of its output. A site that several layers read is learned with the first of them. Held in memory: what
    enters one block, and what one layer reads and makes. Layers that are finished are not learned again, and
    those that do not read and make a row per sample, or read others that vary beside, not at all.
    """
    program, floats = runner.program, float_program(runner.model.model, runner.program, reference.state)
    seen, held = data.seen.inputs, data.held.inputs
    streams = Streams(seen, seen, held, held)
    coded = {name for name, weight in runner.model.weights.items() if weight.integer}
    names = [(block, name) for block in blocks for name in block.layers if name in coded]
    found: dict[str, Learned] = {}
    taken: set[str] = set()
    at = blocks[0]
    for block, name in track(names, "AdaQuant", enabled=training.progress):
        while at is not block:
            streams = streams.after(runner, floats, at, parallel)
            at = blocks[blocks.index(at) + 1]
        calls = [call for call in calls_of(runner, block, name) if _goes_by_rows(program, call)]
        if not calls:
            continue
        sites = {call.site for call in calls if call.site is not None} - taken
        tasks = partial(_tasks, floats if parallel else runner, floats, block, calls, streams)
        work = partial(learn_layer, runner, reference, name, tasks, sites, training)
        found[name] = training.cache.learned(f"layer {name}", runner.model, [name], work, training.generator)
        taken |= sites
    return found


@dataclass(frozen=True)
class LayerInTraining:
    """A layer while its weight, its bias and the ranges of sites that it reads are learned; ``state`` is that of the
    network before.
    """

    runner: SimulatedProgram
    name: str
    weight: JointWeight
    ranges: dict[str, LearnedRange]
    state: Mapping[str, Tensor]

    @classmethod
    def of(cls, runner: SimulatedProgram, reference: FloatReference, name: str, sites: set[str]) -> LayerInTraining:
        model = runner.model
        bias = model.floats.bias(name)
        start = model.weights[name]
        assert start.integer, "what has no codes is not learned"
        weight = JointWeight(reference.weights[name], start, bias, reference.spread[name])
        starts = [(site, model.ranges[site]) for site in sorted(sites & model.ranges.keys())]
        ranges = {site: LearnedRange(start, joint=True) for site, start in starts if start.static and start.integer}
        return cls(runner, name, weight, ranges, runner.program.state_of(model.model))

    def error(self, task: Task, x: Tensor, wanted: Tensor) -> Tensor:
        """The squared error of what a call makes of ``x``, in units of what its task wants."""
        model, program, site = self.runner.model, self.runner.program, task.call.site or ""
        quantizer = self.ranges.get(site, model.ranges.get(site))
        x, wanted = (one.to(self.weight.code.device) for one in (x, wanted))
        x = x if quantizer is None else quantizer.fake_quantize(x)
        placed = model.floats.placed(self.name, self.weight.value(), self.state)
        now = {**self.state, **{key: program.laid_out(tensor) for key, tensor in placed.items()}}
        if (bias := self.weight.bias()) is not None:
            now[str(model.floats.layers[self.name].bias)] = bias
        values = {**task.beside, task.call.reads: x}
        (made,) = program.replay(values, now, [task.call.makes], part=self.runner.part(task.call.segment, values))
        return (made - wanted).square().mean() / task.unit


def learn_layer(
    runner: SimulatedProgram,
    reference: FloatReference,
    name: str,
    make_tasks: Callable[[], Sequence[Task]],
    sites: set[str],
    training: Training,
) -> Learned:
    """Learn a layer and the ranges of ``sites``, which it reads; what was learned stays where it helps on inputs that
    were held back.
    """
    tasks, laid_out = make_tasks(), runner.program.laid_out
    layer = LayerInTraining.of(runner, reference, name, sites)

    def losses(indices: Tensor) -> list[Tensor]:
        errors = [layer.error(task, laid_out(task.inputs[indices]), task.wanted[indices]) for task in tasks]
        return [torch.stack(errors).sum()]

    @torch.no_grad()
    def held_back() -> float:
        return sum(float(layer.error(task, laid_out(task.held_inputs), task.held_wanted)) for task in tasks)

    silent, samples = replace(training, progress=False), len(tasks[0].inputs)
    parts: list[JointWeight | LearnedRange] = [layer.weight, *layer.ranges.values()]
    rated = [one for part in parts for one in part.rated(training.schedule)]
    learned = learn(rated, losses, held_back, samples, silent, name)
    settle(runner.model, {name: layer.weight}, layer.ranges)
    return learned
