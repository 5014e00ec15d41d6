"""A traced model as operations between its sites: what deciding needs to know of its structure."""

from __future__ import annotations

from collections.abc import Sequence

from quantkit.plan.operations import Operation
from quantkit.program.codes import fused_output, moves_values, on_codes, root_of
from quantkit.program.intercept import read_place
from quantkit.program.program import Program, Step
from quantkit.program.sites import Site, sites_by_maker
from quantkit.targets import Target

OUTPUT = "output"


def operations_of(program: Program, sites: Sequence[Site], target: Target) -> tuple[Operation, ...]:
    """The operations that make or read a site, in execution order, and one that reads what the model returns.

    What only moves values belongs to the site it moves; an activation that the runtime fuses belongs to what it is
    fused into.
    """
    reader = _Reader(program, sites, target)
    found = [reader.operation(op) for op in program.steps if not moves_values(op)]
    returned = Operation(OUTPUT, "float", reader.names(program.outputs))
    return tuple(op for op in (*found, returned) if op is not None and (op.reads or op.writes))


class _Reader:
    """Names values by the site that holds their codes."""

    def __init__(self, program: Program, sites: Sequence[Site], target: Target) -> None:
        self.program, self.target = program, target
        self.site = {site.place: site.name for site in sites}
        self.read = {place: site.name for site in sites for place in site.places}
        self.made = sites_by_maker(program, sites)
        self.layer_of = {call.key: name for name, calls in program.calls.items() for call in calls}
        self.fused: set[int] = set()

    def names(self, values: Sequence[int]) -> tuple[str, ...]:
        """The sites of values, each once."""
        places = [self.program.producer.get(root_of(self.program, value)) for value in values]
        return tuple(dict.fromkeys(self.site[place] for place in places if place is not None and place in self.site))

    def operation(self, op: Step) -> Operation | None:
        """The operation of a call; None for an activation that was fused into the one before."""
        layer = self.layer_of.get(op.key)
        if layer is None:
            found = on_codes(self.program, op, self.target)
            made = None if found is None else found.result
        else:
            made = fused_output(self.program, op.outputs[0], self.target.fused_activations)
        if layer is None and made is not None and not self.names([made]):
            made = None  # its result is no site: it runs in float
        if made is None:
            return None if self.fused.issuperset(op.outputs) else self._float(op)
        if made != op.outputs[0]:
            self.fused.add(made)
        if layer is None:
            return Operation(str(op.key), "integer", self.names(op.inputs), self.names([made]))
        coded = self.program.kinds[layer] in self.target.output_coded
        call = next(call for call in self.program.calls[layer] if call.key == op.key)
        own = self.read.get(read_place(op.key))
        reads = self.names([call.input]) if own is None else (own,)
        return Operation(layer, "layer", reads, self.names([made]), coded)

    def _float(self, op: Step) -> Operation:
        places = [self.program.producer.get(value) for value in op.outputs]
        writes = dict.fromkeys(self.made[place] for place in places if place in self.made)
        return Operation(str(op.key), "float", self.names(op.inputs), tuple(writes))
