"""Exporting a model with as many sizes varying as its code allows: one that it fixes does not freeze the others.

torch.export makes a constant of a size that the code fixes, and notes what the path it followed asks of the others.
Sizes for which no other batch goes that way are fixed as well, and the model is exported once more without them. So
are those that the exporter makes constants of where ONNX has no other form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir
from torch.export import ExportedProgram

from quantkit.backends.onnxruntime.conditions import SizeTrace
from quantkit.backends.onnxruntime.dynamic import Asked, TakenSizes
from quantkit.backends.onnxruntime.other_sizes import OtherSizes
from quantkit.backends.onnxruntime.translated import first_line, not_exported
from quantkit.program.input_shapes import Place
from quantkit.program.inputs import Batch
from quantkit.program.intercept import CALL_ERRORS

Route = Callable[[frozenset[Place]], tuple[ExportedProgram, SizeTrace]]
Convert = Callable[[ExportedProgram], ir.Model]


@dataclass(frozen=True)
class TracedSizes:
    """The graph of a traced model and the ``sizes`` it takes; ``others`` are batches of other sizes, ``fixed`` the
    sizes that were to vary and do not, with the reason.
    """

    graph: ir.Model
    sizes: TakenSizes
    others: list[Batch]
    fixed: dict[Place, str]


class _Stopped(Exception):
    """A route cannot be followed."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


@dataclass(frozen=True)
class _Demands:
    """What a trace asks of sizes: those that it takes, batches of ``others`` that it takes, those that are ``gone``
    and do not vary, and whether that is ``settled``, with nothing to be traced again for.
    """

    sizes: TakenSizes
    others: list[Batch]
    gone: frozenset[Place]
    settled: bool

    @classmethod
    def of(cls, others: OtherSizes, trace: SizeTrace, places: frozenset[Place]) -> _Demands:
        asked = others.asked
        sizes = TakenSizes(trace.sizes(tuple(asked.shapes)), trace.conditions())
        constant = places - sizes.dynamic
        as_given = all(sizes.sizes[place] == asked.size(place) for place in constant)
        # traced on fewer samples: what it says of the others is not what it says of all
        chosen, unmet = others.taken(sizes) if as_given else ([], frozenset[Place]())
        gone = constant | unmet
        if gone & asked.batch:
            gone |= asked.batch & places
        return cls(sizes, chosen, gone, as_given and gone == constant)


def trace_sizes(others: OtherSizes, routes: Sequence[Route], convert: Convert) -> TracedSizes:
    """The first of ``routes`` that leaves no size fixed, or that which leaves fewest. Raises InvalidRequest where none
    can be followed.
    """
    reasons: dict[Place, str] = {}
    error: Exception | None = None
    for places in _fewer_and_fewer(others.asked):
        best: TracedSizes | None = None
        for route in routes:
            try:
                found = _settled(others, route, convert, places)
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


def _settled(others: OtherSizes, route: Route, convert: Convert, places: frozenset[Place]) -> TracedSizes:
    """Export by a route, again without what turns out to be fixed, until nothing more does."""
    fixed = dict[Place, str]()
    while True:
        try:
            program, trace = route(places)
        except CALL_ERRORS as error:
            raise _Stopped(error) from error
        demands, graph = _Demands.of(others, trace, places), None
        if demands.settled:
            graph = convert(program)
            demands = _Demands.of(others, trace, places)  # with what the exporter asked
        fixed |= {place: _reason(others, trace, demands.sizes, place) for place in sorted(demands.gone)}
        if demands.settled and graph is not None:
            return TracedSizes(graph, demands.sizes, demands.others, fixed)
        places -= demands.gone


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
