"""The float model's outputs by batch, held where they are small, and else made again from what enters the last layer.

With a vocabulary of 150,000 the logits of every token take a thousand times what enters the layer that makes them. So
of each batch only the values are kept that are alive before that layer, and the rest of the program is replayed on
them, with copies of the weights that it reads: the model may have been quantized since.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quantkit.program.inputs import Batch, batch_size
from quantkit.program.program import Part, Program
from quantkit.program.updates import plain_mode
from quantkit.sensitivity.measure import Subject
from quantkit.sensitivity.outputs import OutputRule, Outputs

HELD_BYTES = 1 << 27  # of outputs
WORTH = 4  # times smaller has to be what is kept instead


@dataclass(frozen=True)
class _Kept:
    """What is alive of a batch before the last layer, and the shapes that calls behind it follow."""

    values: Mapping[int, Tensor]
    shapes: Mapping[int, tuple[int, ...]]


@dataclass
class LastLayers(Sequence[Outputs]):
    """The outputs of all batches, each made when it is asked for; the last one asked for is held."""

    program: Program
    start: int
    state: Mapping[str, Tensor]
    rule: OutputRule
    batches: list[Batch] = field(default_factory=list)
    kept: list[_Kept] = field(default_factory=list)
    held: tuple[int, Outputs] | None = None

    @classmethod
    def of(cls, program: Program, model: nn.Module, rule: OutputRule) -> LastLayers | None:
        """For a program that stands for the model, with nothing kept yet; None where it has no layer, or where what
        enters the last one is not much smaller than the outputs.
        """
        start, known = _last_layer(program), set(program.output_names)
        if start is None or not program.rows or not {output.name for output in rule.outputs} <= known:
            return None
        wanted = _wanted(program, rule)
        if WORTH * _elements(program, program.alive_at(start)) > _elements(program, wanted):
            return None
        names = program.names_read(start, len(program.steps), wanted)
        state = {n: x.clone() for n, x in program.state_of(model).items() if n in names}
        return cls(program, start, state, rule)

    def keep(self, model: nn.Module, batch: Batch) -> None:
        """Add a batch; the model is the float model now."""
        alive, shapes = self.program.alive_at(self.start), dict[int, tuple[int, ...]]()
        with plain_mode(model):
            values = self.program.entering(model, batch)
            part = Part(0, self.start, shapes)
            found = self.program.replay(values, self.program.state_of(model), alive, None, part)
        self.batches.append(batch)
        self.kept.append(_Kept(dict(zip(alive, (x.clone() for x in found), strict=True)), shapes))

    def __len__(self) -> int:
        return len(self.kept)

    def __iter__(self) -> Iterator[Outputs]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i):
        if self.held is None or self.held[0] != i:
            self.held = None
            self.held = i, self._made(self.kept[i], self.batches[i])
        return self.held[1]

    def _made(self, kept: _Kept, batch: Batch) -> Outputs:
        part = Part(self.start, len(self.program.steps), dict(kept.shapes))
        values = {number: x.clone() for number, x in kept.values.items()}  # calls may work in place
        with torch.no_grad():
            tensors = self.program.replay(values, self.state, _wanted(self.program, self.rule), None, part)
        return self.rule.rows_of(tensors, batch)


def float_outputs(subject: Subject) -> Sequence[Outputs]:
    """The outputs of a subject's float model, which knows its rule then."""
    stream = subject.float_outputs()
    first = next(stream, None)
    if first is None:
        return []
    if subject.program is None or subject.rule is None or _all_bytes(first, subject.batches) <= HELD_BYTES:
        return [first, *stream]
    made = LastLayers.of(subject.program, subject.model, subject.rule)
    if made is None:
        return [first, *stream]
    del stream, first  # before others are made
    for batch in subject.batches:
        made.keep(subject.model, batch)
    return made


@dataclass(frozen=True)
class Column(Sequence[Tensor]):
    """The rows of one output of all batches."""

    outputs: Sequence[Outputs]
    number: int

    def __len__(self) -> int:
        return len(self.outputs)

    def __iter__(self) -> Iterator[Tensor]:
        return (outputs[self.number] for outputs in self.outputs)

    def __getitem__(self, i):
        return self.outputs[i][self.number]


def columns_of(outputs: Sequence[Outputs]) -> list[Column]:
    """The outputs by output instead of by batch, made when they are asked for."""
    return [Column(outputs, number) for number in range(len(outputs[0]))] if len(outputs) else []


def _all_bytes(first: Outputs, batches: Sequence[Batch]) -> int:
    """About what the outputs of all batches take, given those of the first."""
    own = sum(rows.numel() * rows.element_size() for rows in first)
    return own * sum(map(batch_size, batches)) // max(1, batch_size(batches[0]))


def _last_layer(program: Program) -> int | None:
    """The position of the last call of a layer on what depends on the inputs."""
    calls = [i for i, step in enumerate(program.steps) if step.key in program.layer_of and not step.constant]
    varying = [i for i in calls if not program.varying.isdisjoint(program.steps[i].inputs)]
    return varying[-1] if varying else None


def _wanted(program: Program, rule: OutputRule) -> list[int]:
    numbers = dict(zip(program.output_names, program.outputs, strict=True))
    return [numbers[output.name] for output in rule.outputs]


def _elements(program: Program, numbers: Sequence[int]) -> int:
    return sum(torch.Size(program.shape[number]).numel() for number in numbers)
