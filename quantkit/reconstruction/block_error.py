"""What an error of a block's output costs the whole network.

BRECQ (Li et al., arXiv 2102.05426) weighs every element of the output by the mean square of its gradient, the diagonal
of the Fisher information. Where the network's output has positions, as logits of every token, plain squared errors are
better than Fisher information in all forms that were tried (docs/methods/block-reconstruction.md), and of the block
that makes the output the damage itself is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.program.padding import Padding, as_rows
from quantkit.program.program import Program
from quantkit.program.segments import Segment
from quantkit.reconstruction.data import Damage, Examples, FloatReference
from quantkit.simulation.playback import Values, in_chunks, rows_first, take

BlockError = Callable[[Tensor, Tensor, Values], Tensor]  # of (found, wanted, the model's inputs), a mean over samples
FISHER_SAMPLES = 256
LEAST_SQUARE = 1e-12


@dataclass(frozen=True)
class ElementError:
    """Squared errors weighed element by element: ``importance`` has the shape of a sample of value ``number``."""

    program: Program
    number: int
    importance: Tensor

    def __call__(self, found: Tensor, wanted: Tensor, inputs: Values) -> Tensor:
        ours, theirs = (rows_first(self.program, self.number, x.to(self.importance.device)) for x in (found, wanted))
        return 0.5 * ((ours - theirs).square() * self.importance).flatten(1).sum(1).mean()


@dataclass(frozen=True)
class PositionError:
    """Squared errors of value ``number`` at every position that is no padding, relative to its mean square."""

    number: int
    padding: Padding | None

    def __call__(self, found: Tensor, wanted: Tensor, inputs: Values) -> Tensor:
        theirs = self._rows(wanted.to(found.device), inputs)
        return (self._rows(found, inputs) - theirs).square().mean() / theirs.square().mean().clamp(min=LEAST_SQUARE)

    def _rows(self, x: Tensor, inputs: Values) -> Tensor:
        return as_rows(x) if self.padding is None else self.padding.rows_of(self.number, inputs)(x)


@dataclass(frozen=True)
class OutputError:
    """The damage of the network's output, of the block that makes it."""

    damage: Damage

    def __call__(self, found: Tensor, wanted: Tensor, inputs: Values) -> Tensor:
        return self.damage(wanted, found, inputs).mean()


def block_errors(
    program: Program,
    reference: FloatReference,
    data: Sequence[Examples],
    blocks: Sequence[Segment],
    padding: Padding | None,
    generator: torch.Generator,
) -> list[BlockError]:
    """The errors by which blocks are learned, in order; none of the last one where the output has no positions."""
    if has_positions(program, program.output):
        errors = [PositionError(block.output, padding) for block in blocks[:-1]]
        return [*errors, OutputError(reference.softened)]
    numbers = [block.output for block in blocks[:-1]]
    importance = fisher(program, reference, data, numbers, generator)
    return [ElementError(program, *one) for one in zip(numbers, importance, strict=True)]


def has_positions(program: Program, number: int) -> bool:
    """Whether a value is (samples, positions, channels)."""
    return len(program.shape[number]) == 3 and program.rows[number] == 0


@torch.enable_grad()
def fisher(
    program: Program,
    reference: FloatReference,
    data: Sequence[Examples],
    numbers: Sequence[int],
    generator: torch.Generator,
) -> list[Tensor]:
    """For each of these values the mean over a few samples of the squared gradient of the pulled output: the diagonal
    of the Fisher information, one weight per element of a sample; where samples have several sizes, per channel.
    """
    sums: list[Tensor] = []
    count = 0
    # gradients begin at the parameters: inputs may be token ids
    state = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in reference.state.items()}
    every = sum(some.count for some in data)
    for some in data:
        order = torch.randperm(some.count, generator=generator, device="cpu")
        few = take(program, some.inputs, order[: FISHER_SAMPLES * some.count // max(every, FISHER_SAMPLES)])
        device = next((x.device for x in reference.state.values()), few[program.inputs[0]].device)
        for part, samples in in_chunks(program, few):
            own = {n: x.to(device) for n, x in part.items()}
            values = program.replay(own, state, [*numbers, program.output])
            gradients = torch.autograd.grad(reference.pull(values[-1], part, generator), values[:-1])
            here = [rows_first(program, n, g).square().sum(0) for n, g in zip(numbers, gradients, strict=True)]
            if len(data) > 1:
                here = [x.flatten(1).mean(1).reshape(-1, *[1] * (x.dim() - 1)) for x in here]
            sums = [total + more for total, more in zip(sums, here, strict=True)] if sums else here
            count += samples
    return [total / count for total in sums]
