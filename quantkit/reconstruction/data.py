"""What learning after rounding learns from: samples of several sizes, those of each size together, and what the float
network makes of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.program.program import Program
from quantkit.program.segments import whole
from quantkit.simulation.playback import FLOAT_BYTES, SimulatedProgram, Values, growth, in_chunks, play_output

Damage = Callable[[Tensor, Tensor, Values], Tensor]
Pull = Callable[[Tensor, Values, torch.Generator], Tensor]
HELD_BYTES = 1 << 26  # of the float outputs of all samples: larger ones are computed whenever they are wanted


@dataclass(frozen=True)
class FloatReference:
    """The float network: its parameters and buffers by name, the weight of every layer to learn, the standard
    deviation of its outputs by channel, ``damage`` of outputs (reference, found, the model's inputs) row by row,
    without padding, ``softened``, a damage to learn by, and ``pull(output, inputs, generator)``, a number whose
    gradient has the Fisher information of the output as its second moment.
    """

    state: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    spread: Mapping[str, Tensor]
    damage: Damage
    softened: Damage
    pull: Pull


@dataclass(frozen=True)
class Examples:
    """``count`` model inputs of one size, as values of the program, with the float model's ``outputs``; None where
    those are computed whenever they are wanted.
    """

    inputs: Values
    count: int
    outputs: Tensor | None = None

    def first(self, count: int) -> Examples:
        """The first ``count`` of them."""
        inputs = {number: x[:count] if x.dim() else x for number, x in self.inputs.items()}
        outputs = None if self.outputs is None else self.outputs[:count]
        return Examples(inputs, min(count, self.count), outputs)

    @torch.no_grad()
    def wanted(self, floats: SimulatedProgram, part: Values, which: slice | Tensor) -> Tensor:
        """The outputs of some of them, whose inputs are a ``part``."""
        return floats.output(part) if self.outputs is None else self.outputs[which]


@dataclass(frozen=True)
class ReconstructionData:
    """Examples of one size to learn from, and others that are held back."""

    seen: Examples
    held: Examples

    def first(self, count: int) -> ReconstructionData:
        """The first ``count`` examples to learn from, and all that are held back."""
        return replace(self, seen=self.seen.first(count))


def pieces(counts: Sequence[int], at_once: Sequence[int], indices: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The samples with these numbers, counted through all sizes: which size, and their numbers among those of it, at
    most so many ``at_once``.
    """
    start = 0
    for size, (count, most) in enumerate(zip(counts, at_once, strict=True)):
        own = indices[(indices >= start) & (indices < start + count)] - start
        yield from ((size, some) for some in own.split(most) if len(some))
        start += count


@torch.no_grad()
def mean_damage(
    runner: SimulatedProgram, floats: SimulatedProgram, examples: Sequence[Examples], damage: Damage
) -> float:
    """The damage of the whole model over examples, as it would ship now."""
    rows, program = [], runner.program
    for some in examples:
        start = 0
        for part, count in in_chunks(program, some.inputs):
            wanted = some.wanted(floats, part, slice(start, start + count))
            rows.append(damage(wanted, runner.output(part), part))
            start += count
    return float(torch.cat(rows).double().mean())


def examples_of(floats: SimulatedProgram, inputs: Values, count: int) -> Examples:
    """Examples with their float outputs, where those can be held."""
    program = floats.program
    held = 0 < count * row_bytes(program, program.output, inputs) <= HELD_BYTES
    return Examples(inputs, count, play_output(floats, inputs, whole(program)) if held else None)


def row_bytes(program: Program, number: int, values: Values) -> float:
    """The bytes of a sample's part of a value, for samples of the size that these values have."""
    return growth(program, values) * math.prod(program.shape[number]) * FLOAT_BYTES / program.size
