"""A simulated model played from its tape, whole or block by block, with parts of it being learned."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quantkit.program.intercept import OpKey
from quantkit.program.segments import Segment, whole
from quantkit.program.tape import Change, Tape
from quantkit.reconstruction.learned import LearnedRange, LearnedWeight
from quantkit.simulation.model import SimulatedModel, as_float

EIGHT_BITS = 8
SPILL_BYTES = 1 << 30  # a value of all samples beyond this size is kept on disk
Values = Mapping[int, Tensor]


@dataclass
class SimulatedProgram:
    """``model`` on its ``tape``. ``weights`` and ``ranges`` take the place of the model's own; sites of 8 bits, whose
    noise is small beside what is being learned, are left out while gradients are taken. With ``dropping``, half of
    the elements at learned sites stay float then, drawn anew each time (QDrop, Wei et al., arXiv 2203.05740).
    ``fixed`` parameters and buffers replace the model's.
    """

    model: SimulatedModel
    tape: Tape
    weights: dict[str, LearnedWeight] = field(default_factory=dict)
    ranges: dict[str, LearnedRange] = field(default_factory=dict)
    dropping: torch.Generator | None = None
    fixed: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        self.sites = {site.place: site.name for site in self.model.sites}
        self.places = self.tape.places()

    def state(self) -> dict[str, Tensor]:
        """The parameters and buffers to compute with, by name."""
        if self.fixed is not None:
            return dict(self.fixed)
        found = self.tape.state_of(self.model.model)
        for name, learned in self.weights.items():
            found[f"{name}.weight"] = self.tape.laid_out(learned.value())
            if (bias := learned.bias()) is not None:
                found[f"{name}.bias"] = bias
        return found

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
        """The value that leaves a segment from those that enter it, which their sites quantize here; what leaves is
        quantized by whoever reads it.
        """
        out = self.places[segment.leaving]

        def change(place: OpKey, x: Tensor) -> Tensor:
            return x if place == out else self.quantize(place, x)

        return self._replay(values, segment, [segment.leaving], change, self.quantize)[0]

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
        entering = {number: at_entry(self.places[number], x) for number, x in values.items()}
        return self.tape.replay(entering, self.state(), wanted, change, (segment.start, segment.stop))

    def output(self, values: Values) -> Tensor:
        """The output of the whole model for its input values, with its own site applied."""
        return self.quantize(self.places[self.tape.output], self.run(values, whole(self.tape, ())))


def copied_state(tape: Tape, model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's parameters and buffers, by name: they stay while the model is being quantized."""
    return {name: tensor.clone() for name, tensor in tape.state_of(model).items()}


def float_program(model: nn.Module, tape: Tape, state: Mapping[str, Tensor]) -> SimulatedProgram:
    """A model on its tape with these parameters and buffers, and nothing quantized."""
    return SimulatedProgram(as_float(model), tape, fixed=state)


def mixed(one: Tensor, other: Tensor, generator: torch.Generator) -> Tensor:
    """Each element from one of two tensors, with equal chances."""
    draw = torch.empty_like(one, dtype=torch.uint8).random_(0, 2, generator=generator)
    return torch.where(draw.bool(), one, other)


def in_chunks(tape: Tape, values: Values) -> Iterator[tuple[dict[int, Tensor], int]]:
    """Values of all samples in pieces of the tape's size, the last one filled up with the first samples, and how many
    of each are meant.
    """
    count = len(next(iter(values.values())))
    for start in range(0, count, tape.size):
        yield take(tape, values, torch.arange(start, start + tape.size) % count), min(tape.size, count - start)


def take(tape: Tape, values: Values, indices: Tensor) -> dict[int, Tensor]:
    """The values of some samples, in memory of their own."""
    return {number: tape.laid_out(x[indices]) for number, x in values.items()}


@torch.no_grad()
def play(runner: SimulatedProgram, values: Values, segment: Segment) -> Tensor:
    """The value that leaves a segment, of all samples."""
    total, start, found = len(next(iter(values.values()))), 0, None
    for part, count in in_chunks(runner.tape, values):
        made = runner.run(part, segment)
        if found is None:
            found = room_for(total, made)
        found[start : start + count] = made[:count]
        start += count
    assert found is not None, "there are samples"
    return found


def room_for(count: int, like: Tensor, limit: int = SPILL_BYTES) -> Tensor:
    """An empty tensor for ``count`` samples such as those of ``like``: in memory, or, past ``limit`` bytes, in a file
    that has no name any more and goes when the tensor does.
    """
    shape = (count, *like.shape[1:])
    elements = math.prod(shape)
    if elements * like.element_size() <= limit:
        layout = torch.channels_last if like.dim() == 4 and _is_channels_last(like) else torch.contiguous_format
        return torch.empty(shape, dtype=like.dtype, memory_format=layout)
    with tempfile.NamedTemporaryFile(prefix="quantkit-") as file:
        return torch.from_file(file.name, shared=True, size=elements, dtype=like.dtype).reshape(shape)


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)
