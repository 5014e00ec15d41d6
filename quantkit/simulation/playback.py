"""A simulated model played from its program, whole or block by block, with parts of it being learned."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from quantkit.formats import EIGHT_BITS
from quantkit.program.intercept import OpKey, device_of
from quantkit.program.padding import Padding
from quantkit.program.program import Change, Part, Program
from quantkit.program.segments import Segment, whole
from quantkit.program.sizes import Shapes
from quantkit.program.weight_source import ModuleSource, WeightSource
from quantkit.reconstruction.learned import LearnedRange, LearnedWeight
from quantkit.simulation.model import SimulatedModel, as_float

CHUNK = 64  # samples played at once, at most
CHUNK_BYTES = 1 << 25  # of the largest value of so many: one sample may be a sequence of thousands of tokens
GRAPH_BYTES = 1 << 27  # of the values that a gradient is taken through at once
SPILL_BYTES = 1 << 30  # a value of all samples beyond this size is kept on disk
FLOAT_BYTES = 4
Values = Mapping[int, Tensor]


@dataclass
class SimulatedProgram:
    """``model`` on its ``program``. ``weights`` and ``ranges`` take the place of the model's own; sites of 8 bits,
    whose noise is small beside what is being learned, are left out while gradients are taken. With ``dropping``, half
    of the elements at learned sites stay float then, drawn anew each time (QDrop, Wei et al., arXiv 2203.05740).
    ``fixed`` parameters and buffers replace the model's. Rows under ``padding`` are not rounded for.
    """

    model: SimulatedModel
    program: Program
    weights: dict[str, LearnedWeight] = field(default_factory=dict)
    ranges: dict[str, LearnedRange] = field(default_factory=dict)
    dropping: torch.Generator | None = None
    fixed: Mapping[str, Tensor] | None = None
    padding: Padding | None = None

    def __post_init__(self) -> None:
        self.source: WeightSource = ModuleSource(self.model.model)
        self.names: dict[tuple[int, ...], set[str]] = {}  # that segments read
        self.sites = {place: site.name for site in self.model.sites for place in site.places}
        self.shapes: dict[tuple[tuple[int, ...], ...], Shapes] = {}  # that calls follow, by the shapes of the inputs
        self.shared: dict[str, Tensor] = {}  # learned weights while several pieces of a batch are differentiated

    def state(self, segment: Segment, wanted: Sequence[int] = ()) -> dict[str, Tensor]:
        """The parameters and buffers that a segment computes with, or that are ``wanted`` of it, by name."""
        if self.fixed is not None:
            return dict(self.fixed)
        floats, layers = self.model.floats, self.model.floats.layers
        names = self._names(segment, wanted)
        learned_in = {str(p) for name in self.weights if (p := layers[name].parameter) is not None}
        found = {n: self.program.laid_out(x) for n, x in self.source.tensors(names | learned_in).items()}
        for name, weight in self.model.weights.items():
            if layers[name].parameter is None:
                found |= floats.placed(name, floats[name], found)
            elif layers[name].parameter in names and name not in self.weights and floats.stores_half(name):
                found |= floats.placed(name, weight.dequantize(), found)
        for name, learned in self.weights.items():
            value = self.shared[name] if name in self.shared else learned.value()
            placed = floats.placed(name, value, found)
            found |= {key: self.program.laid_out(x) for key, x in placed.items()}
            if (bias := learned.bias()) is not None:
                found[str(floats.layers[name].bias)] = bias
        return found

    @contextmanager
    def sharing_weights(self) -> Iterator[None]:
        """Compute the learned weights once for all that is differentiated inside the block, at whose end their
        gradients are passed on.
        """
        values = {name: learned.value() for name, learned in self.weights.items()}
        self.shared = {name: value.detach().requires_grad_() for name, value in values.items()}
        yield
        reached = [name for name, leaf in self.shared.items() if leaf.grad is not None]
        torch.autograd.backward([values[name] for name in reached], [self.shared[name].grad for name in reached])
        self.shared = {}

    def _names(self, segment: Segment, wanted: Sequence[int]) -> set[str]:
        key = (segment.start, segment.stop, *wanted)
        if key not in self.names:
            self.names[key] = self.program.names_read(segment.start, segment.stop, wanted)
        return self.names[key]

    def part(self, segment: Segment, values: Values) -> Part:
        """The steps of a segment, with the shapes that they follow from before it."""
        if not segment.start or not self.program.sized:
            return Part(segment.start, segment.stop)
        program, rows = self.program, samples_of(self.program, values)
        inputs = {n: tuple(values[n].shape) if n in values else program.shape_at(n, rows) for n in program.inputs}
        key = tuple(inputs.values())
        if key not in self.shapes:
            self.shapes[key] = program.shapes_at(inputs, program.state_of(self.model.model))
        return Part(segment.start, segment.stop, dict(self.shapes[key]))

    def quantize(self, place: OpKey, x: Tensor) -> Tensor:
        """A tensor as its site leaves it."""
        name = self.sites.get(place)
        if name in self.ranges:
            y = self.ranges[name].fake_quantize(x)
            return y if self.dropping is None or not torch.is_grad_enabled() else mixed(y, x, self.dropping)
        found = None if name is None else self.model.ranges.get(name)
        if found is None or (found.bits == EIGHT_BITS and torch.is_grad_enabled()):
            return x
        return found.fake_quantize(x)

    def run(self, values: Values, segment: Segment) -> Tensor:
        """The output of a segment from the values that enter it, which their sites quantize here; the output is
        quantized by whoever reads it.
        """
        return self.leaving(values, segment)[segment.output]

    def leaving(self, values: Values, segment: Segment) -> dict[int, Tensor]:
        """All values that leave a segment, the output first."""
        out = self.program.producer.get(segment.output)

        def change(place: OpKey, x: Tensor) -> Tensor:
            return x if place == out else self.quantize(place, x)

        found = self._replay(values, segment, segment.leaving, change, self.quantize)
        return dict(zip(segment.leaving, found, strict=True))

    def inside(
        self, values: Values, segment: Segment, wanted: Sequence[int], without: OpKey | None = None
    ) -> list[Tensor]:
        """The values of any numbers at the end of a segment, all sites applied but that at a place ``without``."""

        def change(place: OpKey, x: Tensor) -> Tensor:
            return x if place == without else self.quantize(place, x)

        return self._replay(values, segment, wanted, change, change)

    def _replay(
        self, values: Values, segment: Segment, wanted: Sequence[int], change: Change, at_entry: Change
    ) -> list[Tensor]:
        places, device = self.program.producer, device_of(self.model.model)
        # what was spilled is on the CPU; what is a shape alone is not read any more
        own = {n: x.to(device) for n, x in values.items() if not x.is_meta}
        entering = {n: at_entry(places[n], x) if n in segment.raw and n in places else x for n, x in own.items()}
        return self.program.replay(entering, self.state(segment, wanted), wanted, change, self.part(segment, values))

    def output(self, values: Values) -> Tensor:
        """The output of the whole model for its input values, with its own site applied."""
        place, found = self.program.producer.get(self.program.output), self.run(values, whole(self.program))
        return found if place is None else self.quantize(place, found)


def copied_state(program: Program, model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's parameters and buffers, by name: they stay while the model is being quantized."""
    return {name: tensor.clone() for name, tensor in program.state_of(model).items()}


def float_program(model: nn.Module, program: Program, state: Mapping[str, Tensor]) -> SimulatedProgram:
    """A model on its program with these parameters and buffers, and nothing quantized."""
    return SimulatedProgram(as_float(model), program, fixed=state)


def mixed(one: Tensor, other: Tensor, generator: torch.Generator) -> Tensor:
    """Each element from one of two tensors, with equal chances."""
    draw = torch.empty_like(one, dtype=torch.uint8, device="cpu").random_(0, 2, generator=generator)
    return torch.where(draw.to(one.device).bool(), one, other)


def in_chunks(program: Program, values: Values) -> Iterator[tuple[dict[int, Tensor], int]]:
    """Values of all samples in pieces of at most ``CHUNK`` samples, and how many each has."""
    count = samples_of(program, values)
    most = played_at_once(program, growth(program, values))
    for start in range(0, count, most):
        some = torch.arange(start, min(start + most, count), device="cpu")
        yield take(program, values, some), len(some)


def played_at_once(program: Program, larger: float = 1.0) -> int:
    """How many samples are played at once, so many times ``larger`` than those that were recorded."""
    largest = max((math.prod(program.shape[n]) for n in program.rows), default=0) * FLOAT_BYTES / program.size
    return max(1, min(CHUNK, int(CHUNK_BYTES // max(1.0, larger * largest))))


def differentiated_at_once(program: Program, segment: Segment, larger: float = 1.0) -> int:
    """How many samples a gradient through a segment is taken for at once, so many times ``larger`` than recorded."""
    made = {n for step in program.steps[segment.start : segment.stop] for n in step.outputs if n in program.rows}
    each = sum(math.prod(program.shape[n]) for n in made) * FLOAT_BYTES / program.size
    return max(1, int(GRAPH_BYTES // max(1.0, larger * each)))


def growth(program: Program, values: Values) -> float:
    """How many times as large these samples are as those that were recorded."""
    shapes = ((x.shape, program.shape[n], program.rows[n]) for n, x in values.items() if n in program.rows)
    return max((math.prod(x) * y[axis] / (x[axis] * math.prod(y)) for x, y, axis in shapes if x[axis]), default=1.0)


def samples_of(program: Program, values: Values) -> int:
    """The number of samples in values."""
    return next(x.shape[program.rows[number]] for number, x in values.items() if number in program.rows)


def take(program: Program, values: Values, indices: Tensor) -> dict[int, Tensor]:
    """The values of some samples, in memory of their own; what is the same for all samples as it is."""
    rows = program.rows
    picked = {n: x[(slice(None),) * rows[n] + (indices,)] if n in rows else x for n, x in values.items()}
    return {n: program.laid_out(x) if n in rows else x for n, x in picked.items()}


@torch.no_grad()
def play(runner: SimulatedProgram, values: Values, segment: Segment) -> dict[int, Tensor]:
    """The values that leave a segment, of all samples."""
    program = runner.program
    total, start = samples_of(program, values), 0
    found: dict[int, Tensor] = {}
    for part, count in in_chunks(program, values):
        made = runner.leaving(part, segment)
        for number, x in made.items():
            if number not in program.rows:
                found[number] = x
                continue
            axis = program.rows[number]
            if number not in found:
                found[number] = room_for(total, x, axis)
            found[number].narrow(axis, start, count).copy_(x)
        start += count
    return found


@torch.no_grad()
def move(runner: SimulatedProgram, parts: list[Values], segment: Segment) -> None:
    """Put what leaves a segment, as its sites leave it, in the place of what enters it: samples go part by part, so
    that either is held once. What is the same for all samples is held once, too. What tells padding stays, and of
    inputs their shapes, which calls further on may follow.
    """
    same: dict[int, Tensor] = {}
    masks = () if runner.padding is None else runner.padding.masks
    for i, part in enumerate(parts):
        held = dict(zip(segment.leaving, runner.inside(part, segment, segment.leaving), strict=True))
        for number, x in held.items():
            axis = runner.program.rows.get(number)
            held[number] = same.setdefault(number, x) if axis is None else _held(x, axis, len(parts))
        shapes = {number: part[number].to("meta") for number in runner.program.inputs}
        parts[i] = shapes | held | {number: part[number] for number in masks}


def _held(x: Tensor, axis: int, parts: int) -> Tensor:
    """A value of one of several parts of the samples: in memory, or on disk where all of it is beyond the limit."""
    if parts * x.numel() * x.element_size() <= SPILL_BYTES:
        return x
    return room_for(x.shape[axis], x, axis, limit=0).copy_(x)


def play_output(runner: SimulatedProgram, values: Values, segment: Segment) -> Tensor:
    """The output of a segment, of all samples."""
    return play(runner, values, replace(segment, leaving=(segment.output,)))[segment.output]


def rows_first(program: Program, number: int, x: Tensor) -> Tensor:
    """A value with its samples along the first axis."""
    return x.movedim(program.rows[number], 0)


def room_for(count: int, like: Tensor, axis: int = 0, limit: int = SPILL_BYTES) -> Tensor:
    """An empty tensor for ``count`` samples along ``axis`` such as those of ``like``: in memory, or, past ``limit``
    bytes, in a file that has no name any more and goes when the tensor does.
    """
    shape = (*like.shape[:axis], count, *like.shape[axis + 1 :])
    elements = math.prod(shape)
    if elements * like.element_size() <= limit:
        layout = torch.channels_last if like.dim() == 4 and _is_channels_last(like) else torch.contiguous_format
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)
    with tempfile.NamedTemporaryFile(prefix="quantkit-") as file:
        return torch.from_file(file.name, shared=True, size=elements, dtype=like.dtype).reshape(shape)


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)
