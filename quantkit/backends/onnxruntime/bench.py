"""A latency table from the node times of a model in several mixtures of float and quantized layers.

In the mixtures every layer runs in float and on codes, between neighbours of both kinds, so that conversions are seen
where they happen. Node times are added up by the part of the model they belong to, and the table has the averages.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quantkit.backends.onnxruntime.node_times import FileTimes
from quantkit.backends.onnxruntime.owners import Owners, owners_of_nodes
from quantkit.plan.latency import FULL_BITS, OperationTime, SiteTime, bits_of
from quantkit.plan.operations import Execution

Floats = npt.NDArray[np.float64]
Part = tuple[str, str]


@dataclass(frozen=True)
class Times:
    """The parts of a latency table, in nanoseconds."""

    operations: dict[str, OperationTime]
    sites: dict[str, SiteTime]
    rest_ns: int


def times_of(
    measured: Sequence[FileTimes],
    executions: Sequence[Execution],
    owners: Owners,
    operations: Sequence[str],
    elements: Mapping[str, int],
) -> Times:
    """The table's parts from measured files and what ran how in each. ``elements``: those of every site, to price
    conversions that no file had by those that some had.
    """
    sums = [_by_part(one, owners) for one in measured]
    rest = np.mean([one.get(("rest", ""), 0.0) for one in sums])
    found = {}
    for name in operations:
        bits = np.array([bits_of(name, execution) or 0 for execution in executions])
        times = np.array([one.get(("operation", name), 0.0) for one in sums])
        integer = _mean(times[(bits > 0) & (bits < FULL_BITS)])
        wide = bits >= FULL_BITS
        found[name] = OperationTime(_mean(times[bits == 0]), integer, _mean(times[wide]) if wide.any() else integer)
    sites = {
        name: (_features(name, executions), np.array([one.get(("site", name), 0.0) for one in sums]))
        for name in elements
    }
    return Times(found, _site_times(sites, elements), round(float(rest)))


def _by_part(one: FileTimes, owners: Owners) -> dict[Part, float]:
    """Nanoseconds of every part of a file, in the shares that its nodes have of the whole run. Nodes are timed as they
    pass, so that on a busy machine the long ones hold what other processes did; the whole run is timed as it works.
    """
    found: dict[Part, float] = defaultdict(float)
    for node, part in owners_of_nodes(one.graph, owners).items():
        found[part] += one.nodes.get(node, 0.0)
    scale = one.total_ns / sum(found.values())
    return {part: scale * time for part, time in found.items()}


def _mean(times: Floats) -> int:
    return round(float(times.mean())) if len(times) else 0


def _features(site: str, executions: Sequence[Execution]) -> Floats:
    """A row per file: (float, codes, quantized, dequantized), each 0 or 1."""
    rows = [(site not in e.coded, site in e.coded, site in e.quantized, site in e.dequantized) for e in executions]
    return np.array(rows, dtype=np.float64)


def _site_times(sites: Mapping[str, tuple[Floats, Floats]], elements: Mapping[str, int]) -> dict[str, SiteTime]:
    """Non-negative least squares for each site; what its files do not tell apart is taken from other sites, by the
    element.
    """
    from scipy.optimize import nnls

    prior = _per_element(sites, elements)
    found = {}
    for name, (features, times) in sites.items():
        expected = prior * elements[name]
        weak = 0.3 * np.eye(4)
        solution, _ = nnls(np.vstack([features, weak]), np.concatenate([times, weak @ expected]))
        found[name] = SiteTime(*(round(float(value)) for value in solution))
    return found


def _per_element(sites: Mapping[str, tuple[Floats, Floats]], elements: Mapping[str, int]) -> Floats:
    """Nanoseconds per element of each feature, over all sites."""
    from scipy.optimize import nnls

    rows = np.vstack([features * elements[name] for name, (features, _) in sites.items()])
    solution, _ = nnls(rows, np.concatenate([times for _, times in sites.values()]))
    return np.asarray(solution, dtype=np.float64)
