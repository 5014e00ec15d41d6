"""Exporting a model with as many sizes varying as its code allows: one that it fixes does not freeze the others.

torch.export makes a constant of a size that the code fixes, and notes what the path it followed asks of the others.
Sizes for which no other batch goes that way are fixed as well, and the model is exported once more without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch.export import ExportedProgram

from quantkit.backends.onnxruntime.conditions import SizeTrace
from quantkit.backends.onnxruntime.dynamic import Asked, TakenSizes
from quantkit.backends.onnxruntime.other_sizes import OtherSizes
from quantkit.backends.onnxruntime.translated import first_line, not_exported
from quantkit.program.input_shapes import Place
from quantkit.program.inputs import Batch
from quantkit.program.intercept import CALL_ERRORS

Route = Callable[[frozenset[Place]], tuple[ExportedProgram, SizeTrace]]


@dataclass(frozen=True)
class TracedSizes:
    """A traced model and the ``sizes`` it takes; ``others`` are batches of other sizes, ``fixed`` the sizes that were
    to vary and do not, with the reason.
    """

    program: ExportedProgram
    sizes: TakenSizes
    others: list[Batch]
    fixed: dict[Place, str]


class _Stopped(Exception):
    """A route cannot be followed."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def trace_sizes(others: OtherSizes, routes: Sequence[Route]) -> TracedSizes:
    """The first of ``routes`` that leaves no size fixed, or that which leaves fewest. Raises InvalidRequest where none
    can be followed.
    """
    reasons: dict[Place, str] = {}
    error: Exception | None = None
    for places in _fewer_and_fewer(others.asked):
        best: TracedSizes | None = None
        for route in routes:
            try:
                found = _settled(others, route, places)
            except _Stopped as stopped:
                error = error or stopped.error
                continue
            if best is None or len(found.fixed) < len(best.fixed):
                best = found
            if not best.fixed:
                break
        if best is not None:
            left_out = others.asked.places - places
            assert error is not None or not left_out
            reasons = {place: first_line(error) for place in sorted(left_out)} if error is not None else {}
            return replace(best, fixed=reasons | best.fixed)
    assert error is not None
    raise not_exported(error) from error


def _fewer_and_fewer(asked: Asked) -> Iterator[frozenset[Place]]:
    """What to let vary: all that is asked for, then less, where a model cannot be followed so."""
    rest = asked.places - asked.batch
    yield from dict.fromkeys((asked.places, rest, asked.batch, frozenset[Place]()))


def _settled(others: OtherSizes, route: Route, places: frozenset[Place]) -> TracedSizes:
    """Export by a route, again without what turns out to be fixed, until nothing more does."""
    asked, fixed = others.asked, dict[Place, str]()
    names = tuple(asked.shapes)
    while True:
        try:
            program, trace = route(places)
        except CALL_ERRORS as error:
            raise _Stopped(error) from error
        sizes = TakenSizes(trace.sizes(names), trace.conditions())
        constant = places - sizes.dynamic
        chosen: list[Batch] = []
        if all(sizes.sizes[place] == asked.size(place) for place in constant):
            chosen, unmet = others.taken(sizes)
        else:  # traced on fewer samples: what it says of the others is not what it says of all
            unmet = frozenset()
        gone = constant | unmet
        if gone & asked.batch:
            gone |= asked.batch & places
        fixed |= {place: _reason(others, trace, sizes, place) for place in sorted(gone)}
        if gone == constant and all(sizes.sizes[place] == asked.size(place) for place in constant):
            return TracedSizes(program, sizes, chosen, fixed)
        places -= gone


def _reason(others: OtherSizes, trace: SizeTrace, sizes: TakenSizes, place: Place) -> str:
    """Why a size is fixed: what was asked of it, and where."""
    names = tuple(others.asked.shapes)
    labels = {symbol: f"{name}.shape[{axis}]" for symbol, (name, axis) in trace.original(names).items()}
    guard = trace.fixing(names, place) or next(
        (one for one in sizes.conditions if sizes.sizes[place] in one.relation.free_symbols), None
    )
    if guard is None:
        return others.reasons.get(place, "it is used as a constant")
    where = f", in {guard.place}" if guard.place is not None else ""
    return f"{guard.text(labels)}{where}"
