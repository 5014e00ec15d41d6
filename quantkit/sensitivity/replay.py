"""Variations of one plan, run together: what a network computes before the first change is not computed again.

Most of what is measured differs from a plan (or from the float model) in one or two layers. Where a program stands for
the model, the values that are alive where the first change happens are kept from one replay of a batch, and each
variation goes on from there; elsewhere every variation is run whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from quantkit.numbers.kinds import AnyQuantizer
from quantkit.program.inputs import Batch
from quantkit.program.intercept import OpKey
from quantkit.program.program import Part, Program
from quantkit.program.updates import plain_mode
from quantkit.sensitivity.measure import Perturbation, Place, Subject
from quantkit.sensitivity.outputs import OutputRule, Outputs

Changes = Mapping[Place, AnyQuantizer]


def variations(subject: Subject, plans: Sequence[Sequence[Perturbation]]) -> Iterator[tuple[int, int, Outputs]]:
    """(batch, plan, outputs, each (rows, classes)) of every plan on every batch, batch after batch.

    The first plan is the one that the others vary; what a plan leaves out is as in the subject's base. Memory: the
    values that are alive at the first changes of the plans, for one batch.
    """
    for number, batch in enumerate(subject.batches):
        if subject.program is None:
            for k, plan in enumerate(plans):
                yield number, k, next(replace(subject, batches=[batch]).outputs(plan))
            continue
        replays = _Replays(subject, replace(subject.program, channels_last=False), batch)
        yield from ((number, k, outputs) for k, outputs in replays.outputs(plans))


@dataclass
class _Replays:
    """Replays of plans on one batch."""

    subject: Subject
    program: Program
    batch: Batch

    def outputs(self, plans: Sequence[Sequence[Perturbation]]) -> Iterator[tuple[int, Outputs]]:
        """(plan, outputs) of every plan, the first one first."""
        states: list[Changes] = [{p.place: p.change for p in [*self.subject.base, *plan]} for plan in plans]
        starts = [self._first_change(states[0], state) for state in states]
        with plain_mode(self.subject.model):
            kept, base = self._base(states[0], sorted(set(starts[1:])))
        yield 0, self.rule.rows_of(base, self.batch)
        for k in range(1, len(plans)):
            with plain_mode(self.subject.model):
                tensors = self._from(starts[k], kept, states[k], base)
            yield k, self.rule.rows_of(tensors, self.batch)

    @property
    def rule(self) -> OutputRule:
        assert self.subject.rule is not None, "the float model was run before"
        return self.subject.rule

    @property
    def wanted(self) -> list[int]:
        """The numbers of the outputs that count."""
        numbers = dict(zip(self.program.output_names, self.program.outputs, strict=True))
        return [numbers[output.name] for output in self.rule.outputs]

    def _base(self, state: Changes, starts: Sequence[int]) -> tuple[dict[int, dict[int, Tensor]], list[Tensor]]:
        """The values alive at each of ``starts``, and the output, of the first plan."""
        values = self.program.entering(self.subject.model, self.batch)
        weights, at = self._weights(state), 0
        kept: dict[int, dict[int, Tensor]] = {}
        self.shapes: dict[int, tuple[int, ...]] = {}
        for start in starts:
            alive = self.program.alive_at(start)
            found = self._replay(values, weights, state, alive, Part(at, start, self.shapes))
            values, at = dict(zip(alive, found, strict=True)), start
            kept[start] = {number: x.clone() for number, x in values.items()}
        return kept, self._replay(values, weights, state, self.wanted, self._rest(at))

    def _from(
        self, start: int, kept: Mapping[int, Mapping[int, Tensor]], state: Changes, base: list[Tensor]
    ) -> list[Tensor]:
        if start == len(self.program.steps):
            return base
        values = {number: x.clone() for number, x in kept[start].items()}  # calls may work in place
        return self._replay(values, self._weights(state), state, self.wanted, self._rest(start))

    def _rest(self, start: int) -> Part:
        return Part(start, len(self.program.steps), self.shapes)

    def _replay(
        self,
        values: Mapping[int, Tensor],
        weights: Mapping[str, Tensor],
        state: Changes,
        wanted: Sequence[int],
        part: Part,
    ) -> list[Tensor]:
        sites = self.subject.sites
        at = {place: c for (name, _), c in state.items() if not c.stored for place in sites[name].places}

        def change(place: OpKey, x: Tensor) -> Tensor:
            return at[place].fake_quantize(x) if place in at else x

        if part.start == 0:
            places = self.program.producer
            values = {n: change(places[n], x) if n in places else x for n, x in values.items()}
        return self.program.replay(values, weights, wanted, change, part)

    def _weights(self, state: Changes) -> dict[str, Tensor]:
        """The model's state with the layers' weights of a plan."""
        floats, found = self.subject.floats, self.program.state_of(self.subject.model)
        for (name, _), change in state.items():
            if change.stored:
                found |= floats.placed(name, change.dequantize(), found)
        return found

    def _first_change(self, first: Changes, other: Changes) -> int:
        """The position of the first step at which two plans differ; the number of steps where none does."""
        changed = {place for place in {*first, *other} if first.get(place) is not other.get(place)}
        position = {step.key: i for i, step in enumerate(self.program.steps)}
        starts = [len(self.program.steps)]
        for name, at_site in changed:
            if at_site:
                place = self.subject.sites[name].place
                starts.append(position.get(replace(place, output=0), 0))
            else:
                starts.append(self.program.first_use(self.subject.floats.layers[name]))
        return min(starts)
