"""Batches of other sizes than the example: those of the calibration data, and the example cut or repeated where only
the user says that a size varies. A file is compared on them; what the model itself does not take is told before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch

from quantkit.backends.onnxruntime.dynamic import Asked, TakenSizes
from quantkit.backends.onnxruntime.translated import first_line
from quantkit.errors import InvalidRequest
from quantkit.program.input_shapes import InputShapes, Place, input_shapes
from quantkit.program.inputs import Batch, batch_size
from quantkit.program.intercept import CALL_ERRORS, tensors_of
from quantkit.program.updates import plain_mode, restored
from quantkit.simulation.model import SimulatedModel

FACTORS = (2.0, 0.5, 1.5)  # of the example's size: networks that halve images several times take one of them


@dataclass
class OtherSizes:
    """Batches of other sizes that the model takes. ``reasons``: why it takes no others along an axis."""

    simulated: SimulatedModel
    asked: Asked
    batches: list[Batch] = field(default_factory=list)
    reasons: dict[Place, str] = field(default_factory=dict)

    @classmethod
    def of(cls, simulated: SimulatedModel, asked: Asked) -> OtherSizes:
        """Raises InvalidRequest for a size that the user names and the model does not take otherwise."""
        found = cls(simulated, asked)
        others = (batch for batch in asked.seen if any(found.differs(batch, place) for place in asked.varying))
        found.batches += [batch for batch in others if found.refusal(batch, asked.varying) is None]
        groups = _groups(asked)
        if groups and not found._add(frozenset().union(*groups)):
            for group in groups:
                found._add(group)
        for place, name in asked.named.items():
            if place in found.reasons and not any(found.differs(batch, place) for batch in found.batches):
                raise InvalidRequest(refused_name(asked, place, name, found.reasons[place]))
        return found

    def _add(self, places: frozenset[Place]) -> bool:
        """Make batches that differ along these axes; whether the model takes one."""
        made = [batch for batch in self._made(places) if self.refusal(batch, places) is None]
        self.batches += made
        return bool(made)

    def _made(self, places: frozenset[Place]) -> Iterator[Batch]:
        for factor in FACTORS:
            sizes = {place: int(self.asked.size(place) * factor) for place in places}
            if all(size > 1 for size in sizes.values()):
                yield self.asked.resized(self.asked.example, sizes)

    def refusal(self, batch: Batch, places: frozenset[Place]) -> str | None:
        """Why the model does not take a batch, noted as the reason for these sizes; None where it does."""
        reason = None
        try:
            rows, samples = self._rows(batch), batch_size(batch)
            if [n == samples for n in rows] != self._per_sample:
                reason = f"for {samples} samples of another size it returns {' and '.join(map(str, rows))} rows"
        except CALL_ERRORS as error:
            reason = first_line(error)
        if reason is not None:
            for place in places:
                self.reasons.setdefault(place, reason)
        return reason

    @cached_property
    def _per_sample(self) -> list[bool]:
        """Whether each output has a row for every sample."""
        return [n == batch_size(self.asked.example) for n in self._rows(self.asked.example)]

    def _rows(self, batch: Batch) -> list[int]:
        """The lengths of the model's outputs."""
        with plain_mode(self.simulated.model), restored(self.simulated.model), torch.no_grad():
            return [len(x) for x in tensors_of(self.simulated(*batch[0], **batch[1])) if x.dim()]

    def differs(self, batch: Batch, place: Place) -> bool:
        """Whether a batch has another size there than the example."""
        return self._shapes(batch)[place[0]][place[1]] != self.asked.size(place)

    def taken(self, sizes: TakenSizes) -> tuple[list[Batch], frozenset[Place]]:
        """Batches that a traced model takes, and the sizes that it lets vary and that do in none of them."""
        asked, open_places = self.asked, sizes.dynamic - self.asked.batch
        left, chosen = set(open_places), list[Batch]()
        for group in (open_places, *_tied(sizes, open_places)):
            made = () if group <= asked.varying else self._made(group)  # what was seen is not made up
            for batch in (*self._restricted(group, sizes), *made):
                new = {place for place in left & group if self.differs(batch, place)}
                if new and sizes.problem(self._shapes(batch)) is None and self.refusal(batch, frozenset(new)) is None:
                    chosen.append(batch)
                    left -= new
        if sizes.problem(asked.shapes) is not None:  # it was traced on two samples, and takes no such number
            left |= sizes.dynamic & asked.batch
        return chosen, frozenset(left)

    def _restricted(self, places: frozenset[Place], sizes: TakenSizes) -> Iterator[Batch]:
        """The known batches, with the example's sizes but along these axes."""
        free = places | (self.asked.batch & sizes.dynamic)
        kept = {place: self.asked.size(place) for place in self.asked.places - free}
        for batch in self.batches:
            yield self.asked.resized(batch, kept)

    def _shapes(self, batch: Batch) -> InputShapes:
        return input_shapes(self.simulated.model, batch)


def _groups(asked: Asked) -> list[frozenset[Place]]:
    """The sizes that only the user says to vary, those of one name together."""
    found: dict[str, set[Place]] = {}
    for place, name in asked.named.items():
        if place not in asked.batch | asked.varying:
            found.setdefault(name, set()).add(place)
    return [frozenset(places) for places in found.values()]


def _tied(sizes: TakenSizes, places: frozenset[Place]) -> list[frozenset[Place]]:
    """The sizes that vary, those that are the same in the graph together."""
    found: dict[object, set[Place]] = {}
    for place in sizes.sizes:
        if place in places:
            found.setdefault(sizes.sizes[place], set()).add(place)
    return [frozenset(group) for group in found.values()]


def refused_name(asked: Asked, place: Place, name: str, reason: str) -> str:
    """Why a size that the user names cannot vary, and what to try."""
    axis, size = place[1], asked.size(place)
    others = [
        f"{other!r} axis {i}"
        for other, shape in asked.shapes.items()
        for i, found in enumerate(shape)
        if found == size and (other, i) not in asked.places
    ]
    follow = f", or, where {' and '.join(others)} follow{'s' * (len(others) == 1)} it, name that too" if others else ""
    return (
        f"dynamic= asks that axis {axis} of {place[0]!r} ({name!r}, {size} in the example) varies, and the model's "
        f"code fixes it ({reason}). Compute sizes from x.shape in its code{follow}, or leave it out of dynamic=."
    )
