"""What runs on codes under a plan, and what that needs at the boundaries: pure bookkeeping over sites.

Which sites a plan has follows from which of its layers stay float. The rules are those by which the graph places sites
(``quantkit.program.codes``), written over names so that deciding needs no model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Operation:
    """One step of a model between its sites, in execution order.

    ``kind``: a "layer"; an "integer" operation, element-wise, which runs on codes as soon as one of its operands has
    them; or "float", whatever else reads or makes a site. ``codes_output``: the layer's kernel writes codes.
    """

    name: str
    kind: str
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    codes_output: bool = False


@dataclass(frozen=True)
class Execution:
    """What runs how: names of the layers and operations on integer kernels, and the sites that hold codes; of those,
    the ones made in float (``quantized``) and the ones that something reads in float (``dequantized``). ``wide`` are
    the layers whose weights take full bytes: they may run on other kernels than narrower ones.
    """

    integer: frozenset[str]
    coded: frozenset[str]
    quantized: frozenset[str]
    dequantized: frozenset[str]
    wide: frozenset[str] = frozenset()


def execute(
    operations: Sequence[Operation], quantized_layers: Collection[str], wide: Collection[str] = ()
) -> Execution:
    """The execution of a plan that quantizes these layers, those of ``wide`` among them with full bytes, and leaves
    all others float.
    """
    layers = frozenset(op.name for op in operations if op.kind == "layer" and op.name in quantized_layers)
    coded: set[str] = set()
    for op in operations:
        if op.name in layers and op.kind == "layer":
            coded.update(op.reads, op.writes if op.codes_output else ())
    integer = set(layers)
    for op in operations:
        if op.kind == "integer" and not coded.isdisjoint(op.reads):
            coded.update(op.reads, op.writes)
            integer.add(op.name)
    made = {site for op in operations if op.name in integer for site in op.writes}
    read_in_float = {site for op in operations if op.name not in integer for site in op.reads}
    return Execution(
        integer=frozenset(integer),
        coded=frozenset(coded),
        quantized=frozenset(coded - made),
        dequantized=frozenset(coded & read_in_float),
        wide=layers.intersection(wide),
    )


def live_sites(operations: Sequence[Operation], sites: Iterable[str]) -> list[tuple[str, ...]]:
    """For every operation the sites that exist while it runs: made by it or before, and read by it or later. A site
    that nothing here makes is an input.
    """
    made = {site: k for k, op in reversed(list(enumerate(operations))) for site in op.writes}
    last = {site: k for k, op in enumerate(operations) for site in (*op.writes, *op.reads)}
    names = [site for site in sites if site in last]
    return [tuple(s for s in names if made.get(s, 0) <= k <= last[s]) for k in range(len(operations))]


def peak_bytes(operations: Sequence[Operation], site_bytes: Mapping[str, int]) -> int:
    """The most bytes of sites that exist at once."""
    return max((sum(site_bytes[s] for s in live) for live in live_sites(operations, site_bytes)), default=0)
