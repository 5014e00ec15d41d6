"""A limit on the size of the ONNX file, graph included: met by making files, as nothing else says how long they are.

A file's length depends on formats and hardly on codes, so a plan's is known, before it is applied, from weights
rounded to nearest and ranges of no meaning. What the graph takes beside the tensors is taken off the limit, and
formats are chosen again for what is left, until the file fits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quantkit.allocation.allocate import allocate
from quantkit.allocation.what_holds import what_holds
from quantkit.budget import Budget
from quantkit.errors import InfeasibleBudget, InvalidRequest
from quantkit.formats import ActivationFormat
from quantkit.numbers.kinds import AnyRange, token_range
from quantkit.numbers.logarithmic import LogRange
from quantkit.numbers.uniform import SiteRange
from quantkit.plan import Plan, Profile
from quantkit.rounding.weights import quantize_weight
from quantkit.session import Session
from quantkit.simulation.model import SimulatedModel
from quantkit.stages.apply import formatted_by, target_of
from quantkit.stages.result import Result
from quantkit.transforms.half_floats import store_floats_as_halves

if TYPE_CHECKING:
    from quantkit.backends.onnxruntime.marks import MarkedGraph

Choose = Callable[[Budget], Plan]
TRIES = 6  # plans whose file is written; each is smaller by what the one before was too large


@dataclass
class FileLengths:
    """The bytes of the files that plans of a ``session`` will have. The float graph, which takes longest to make, is
    made once for plans that quantize the same activations, and leave the same weights float where these are rounded.
    """

    session: Session
    graphs: dict[tuple[str, ...], MarkedGraph] = field(default_factory=dict)

    def __call__(self, plan: Plan) -> int:
        """Those of a plan that is not applied yet. Raises InvalidRequest where the model cannot be exported."""
        formatted = formatted_by(self.session.fork(), plan)  # the session's own weights stay float
        ready = formatted.ready
        weights = {}
        for name, fmt in formatted.weights.items():
            groups = ready.weights.layers[name].groups
            weights[name] = quantize_weight(ready.weights[name], [fmt], None, groups, "nearest").weights[fmt]
        ranges = {site.name: _some_range(formatted.sites[site.name]) for site in ready.sites}
        simulated = SimulatedModel(ready.model, ready.sites, weights, ranges, ready.weights, ready.program.updated)
        made = tuple(site.name for site in ready.sites)
        if ready.half_floats:  # the graph has the values of what is float: those of other layers are codes
            store_floats_as_halves(simulated, ready.halves)
            made += tuple(name for name in ready.layers if name not in weights)
        if made not in self.graphs:
            self.graphs[made] = self._graph(simulated.on_cpu())
        return self._length(simulated.on_cpu(), self.graphs[made], plan)

    def of_result(self, result: Result) -> int:
        """Those of a plan that is applied: what was learned and rewritten is in it."""
        simulated = result.simulated().on_cpu()
        return self._length(simulated, self._graph(simulated), result.plan)

    def _graph(self, simulated: SimulatedModel) -> MarkedGraph:
        from quantkit.backends.onnxruntime.marks import mark_graph

        if not self.session.inputs.shown:
            raise InvalidRequest(
                "file_size is met by writing files, which runs the model: pass calibration, or example_inputs, one "
                "batch of model inputs."
            )
        return mark_graph(simulated, self.session.inputs.shown[0])

    def _length(self, simulated: SimulatedModel, graph: MarkedGraph, plan: Plan) -> int:
        from quantkit.backends.onnxruntime.writer import ExportOptions, length_of

        target = target_of(self.session, plan)
        options = ExportOptions(target.instruction_set, plan=plan, domains=target.operator_domains)
        return length_of(simulated, graph, options)


def require_file(result: Result, lengths: FileLengths, limit: Budget, blank: Profile) -> None:
    """Raise InfeasibleBudget where the file of a result is over the limit after all: some forms are found only when a
    plan is applied.
    """
    found = lengths.of_result(result)
    if found > limit.file_bytes:
        raise _too_large(limit, found, result.plan, blank)


@dataclass(frozen=True)
class FileLimit:
    """The ``limit`` on files, whose ``length`` is that of a plan's; ``least`` is the smallest plan's. ``blank`` is the
    profile before anything was measured.
    """

    limit: Budget
    blank: Profile
    length: Callable[[Plan], int]
    least: int


def fitting_plan(choose: Choose, file: FileLimit) -> tuple[Plan, Budget]:
    """The plan that ``choose`` finds within limits whose file fits, and the limits, with one on the file's tensors.
    Raises InfeasibleBudget where none does.
    """
    most, seen = file.limit.file_bytes, set[int]()
    room = most
    while True:
        asked = file.limit.with_tensors(room, file.blank)
        plan = choose(asked)
        found = file.length(plan)
        if found <= most:
            return plan, asked
        if plan.total_bytes in seen or len(seen) == TRIES:
            raise _too_large(file.limit, max(found, file.least), plan, file.blank)
        seen.add(plan.total_bytes)
        room = plan.total_bytes - (found - most)


def smallest_file(blank: Profile, limit: Budget, length: Callable[[Plan], int]) -> int:
    """The length of the file of the smallest plan. Raises InfeasibleBudget where that is over the limit, which is
    known before anything is measured.
    """
    try:
        plan = allocate(blank, Budget(size="1 B"))
    except InfeasibleBudget as error:
        plan = allocate(blank, Budget(size=f"{error.smallest:.0f} B"))
    found = length(plan)
    if found > limit.file_bytes:
        raise _too_large(limit, found, plan, blank)
    return found


def _too_large(limit: Budget, found: int, plan: Plan, blank: Profile) -> InfeasibleBudget:
    unit = limit.unit("file_size")
    smallest = limit.in_file_unit(found)
    return InfeasibleBudget(
        f"No plan has file size {limit.file_size}: the smallest file that was found has {smallest:g} {unit}, of which "
        f"{plan.total_bytes:,} bytes are tensors and the rest is the graph. Ask for at least that"
        f"{what_holds('size', limit.file_bytes, blank, None)}",
        f"file_size={limit.file_size}",
        smallest,
    )


def _some_range(fmt: ActivationFormat) -> AnyRange:
    """A range of a format; its numbers do not matter."""
    if fmt.dynamic:
        return token_range(fmt)
    return SiteRange(1.0, 0, fmt.bits) if fmt.is_integer else LogRange(1.0, fmt.bits)
