"""Inner products with gradients of drawn labels, one segment of a program at a time.

Where the graph of one sample is too large, the values between segments are kept from a forward without a graph; then,
from the last segment to the first, each is computed again with one, and the gradients by what enters it go on to the
segment before (Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from quantkit.program.inputs import batch_size
from quantkit.program.intercept import OpKey
from quantkit.program.program import Part, Program, Step
from quantkit.program.segments import Segment, blocks_of
from quantkit.program.updates import plain_mode
from quantkit.sensitivity.curvature import Landscape
from quantkit.sensitivity.measure import Place
from quantkit.sensitivity.output_gradients import Calls, Pass, Passes, gradients, whole

Values = dict[int, Tensor]
Shapes = dict[int, tuple[int, ...]]


def passes_for(land: Landscape) -> Passes:
    """The whole graph of a batch, or segment by segment where that of one sample is too large and there is a program
    whose outputs its last segment makes.
    """
    program = land.subject.program
    if land.sample_bytes <= land.most_bytes or program is None or not program.rows or land.subject.base:
        return whole
    parts = blocks_of(program, [name for name, _ in land.layers if name in program.calls])
    made = {n for step in program.steps[parts[-1].start :] for n in step.makes}
    return _Segmented(land, program, parts) if len(parts) > 1 and set(_wanted(land, program)) <= made else whole


def _wanted(land: Landscape, program: Program) -> list[int]:
    """The numbers of the outputs that count."""
    numbers = dict(zip(program.output_names, program.outputs, strict=True))
    return [numbers[output.name] for output in land.damage.rule.outputs]


class _Segmented:
    """Passes over the segments of a program, whose layers' calls go through whatever ``calls`` is at the time."""

    def __init__(self, land: Landscape, program: Program, parts: Sequence[Segment]) -> None:
        self.parts, self.wanted = parts, _wanted(land, program)
        self.program = replace(program, steps=tuple(map(self._watched, program.steps)), channels_last=False)
        self.plain = replace(program, channels_last=False)
        self.sites = {
            place: s for s in land.subject.sites.values() for place in s.places if (s.name, True) in land.members
        }
        self.calls: Calls | None = None

    def _watched(self, step: Step) -> Step:
        def func(*args: Any, **kwargs: Any) -> Any:
            assert self.calls is not None, "set for every segment"
            return self.calls.carry_out(step.key, step.func, args, kwargs)

        return step if step.constant else replace(step, func=func)

    def __call__(self, land: Landscape, i: int, draws: int, generator: torch.Generator) -> Iterator[Pass]:
        state = self.plain.state_of(land.subject.model)
        kept = self._between(land, i, state)
        onward: dict[int, list[Tensor]] = {}
        for number, (part, (values, shapes)) in reversed(list(enumerate(zip(self.parts, kept, strict=True)))):
            self.calls = Calls(land, batch_size(land.subject.batches[i]) == 1, state)
            graph = _Graph.of(self, part, values, shapes, state, onward if number + 1 < len(self.parts) else None)
            slopes = {key: list[Tensor]() for key in graph.variables}
            passed: dict[int, list[Tensor]] = {n: [] for n in graph.leaves}
            outputs, drawn = graph.outputs, None
            if number + 1 == len(self.parts):
                outputs = list(land.damage.rule.rows_of(outputs, land.subject.batches[i]))
                drawn = (land.damage.cotangent(tuple(x.detach() for x in outputs), generator) for _ in range(draws))
            for draw in range(draws):
                cotangents = next(drawn) if drawn is not None else [onward[n][draw] for n in graph.numbers]
                by = [*graph.variables.values(), *graph.leaves.values()]
                found = gradients(outputs, by, cotangents, keep=draw + 1 < draws)
                for own, slope in zip((*slopes.values(), *passed.values()), found, strict=True):
                    own.append(slope)
            _hand_on(onward, graph.numbers, passed)
            yield Pass(self.calls, slopes, graph.raw, graph.raw)

    @torch.no_grad()
    def _between(self, land: Landscape, i: int, state: Mapping[str, Tensor]) -> list[tuple[Values, Shapes]]:
        """What enters every segment, and the shapes known there."""
        values, shapes = self.plain.entering(land.subject.model, land.subject.batches[i]), Shapes()
        kept = [(dict(values), dict(shapes))]
        with plain_mode(land.subject.model):
            for part in self.parts[:-1]:
                copies = {n: x.clone() for n, x in values.items()}  # calls may work in place
                where = Part(part.start, part.stop, shapes)
                found = self.plain.replay(copies, state, part.leaving, None, where)
                values = dict(zip(part.leaving, found, strict=True))
                kept.append((values, dict(shapes)))
        return kept


@dataclass(frozen=True)
class _Graph:
    """A segment computed with its graph: the values ``numbers`` that it made and are read later, ``outputs``, what it
    is differentiated by, and the entering values, ``leaves``, by which too.
    """

    numbers: list[int]
    outputs: list[Tensor]
    variables: dict[OpKey | Place, Tensor]
    leaves: Values
    raw: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        how: _Segmented,
        part: Segment,
        values: Values,
        shapes: Shapes,
        state: Mapping[str, Tensor],
        onward: Mapping[int, list[Tensor]] | None,
    ) -> _Graph:
        """``onward`` are the gradients by values that later segments read; None in the last segment."""
        program, calls, raw = how.program, how.calls, dict[str, Tensor]()
        assert calls is not None, "set for every segment"
        added: dict[OpKey | Place, Tensor] = {}

        def change(place: OpKey, x: Tensor) -> Tensor:
            if place not in how.sites:
                return x
            site = how.sites[place]
            raw[site.name] = x.detach().clone()
            return x + added.setdefault((site.name, True), torch.zeros_like(x).requires_grad_())

        behind = part.start > 0
        leaves = {n: x.detach().requires_grad_() for n, x in values.items() if behind and x.is_floating_point()}
        entering = {n: leaves.get(n, x).clone() for n, x in values.items()}
        if not behind:
            places = program.producer
            entering = {n: change(places[n], x) if n in places else x for n, x in entering.items()}
        numbers = how.wanted if onward is None else [n for n in onward if n not in values]
        outputs = program.replay(entering, state, numbers, change, Part(part.start, part.stop, dict(shapes)))
        variables: dict[OpKey | Place, Tensor] = dict(calls.added.items())
        return cls(numbers, outputs, variables | added, leaves, raw)


def _hand_on(onward: dict[int, list[Tensor]], made: Sequence[int], passed: Mapping[int, list[Tensor]]) -> None:
    """Let gradients by what a segment made become those by what entered it, added to those of later readers."""
    for number in made:
        onward.pop(number, None)
    for number, slopes in passed.items():
        others = onward.get(number)
        onward[number] = slopes if others is None else [a + b for a, b in zip(others, slopes, strict=True)]
