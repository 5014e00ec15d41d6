"""HAWQ-V2: half the mean eigenvalue of a layer's Hessian times the squared error of its weight.

Omega_i(b) = 1/2 Tr(H_ii) / n_i ||Q_b(W_i) - W_i||^2 (Dong et al., arXiv 1911.03852; docs/methods/hessian-trace.md),
the expected damage where the error points in no particular direction inside a layer; structured rounding breaks this.
For a site the same with the mean trace over samples by its tensor, matrix-free: in eval mode samples do not interact,
so one probe of the whole tensor is the sum of a probe per sample. Traces are Hutchinson's estimates z^T H z with
random signs z, which have the least variance, drawn anew for every batch, so that every batch is a probe of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from quantkit.progress import track, warn
from quantkit.sensitivity.curvature import GRAPH_SAMPLES, Landscape, gradients, hessian_product, inner
from quantkit.sensitivity.first_order import slopes
from quantkit.sensitivity.measure import Perturbation, Place, Scores, Subject, random_signs
from quantkit.sensitivity.registry import Cost, estimator

LEAST_PROBES, MOST_PROBES = 16, 100
PRECISE = 0.03  # stop when every standard error is below this share of its trace
IMPRECISE = 0.10  # above this share after joint probes, a layer gets probes of its own until it is not


Probe = Callable[[Landscape, int, list[Place]], dict[Place, float]]


@dataclass(frozen=True)
class Probing:
    """How traces are probed: by what, until every standard error is at most ``goal`` of its trace, at ``most`` so many
    times; ``together``: all places at once, so that none is left out for being precise enough.
    """

    probe: Probe
    goal: float
    most: int
    together: bool


@dataclass(frozen=True)
class Trace:
    """The trace of one place's Hessian block, its standard error over probes, and how many of which kind."""

    mean: float
    standard_error: float
    probes: int
    alone: bool = False

    @property
    def relative_error(self) -> float:
        return self.standard_error / abs(self.mean) if self.mean else float(self.standard_error > 0)


# a forward, a backward and a double backward of a batch for each joint probe
@estimator(
    "hessian-trace", Cost(lambda work: 7 * max(1, MOST_PROBES * GRAPH_SAMPLES / work.samples), keeps_graph=True)
)
def hessian_trace(
    subject: Subject, perturbations: Sequence[Perturbation], progress: bool, generator: torch.Generator
) -> Scores:
    """Traces by up to ``MOST_PROBES`` joint probes (or one for each batch), each a forward, a backward and a double
    backward of one batch, and as many double backwards again for every layer and site these leave vague. Negative
    traces count as 0, with a warning. The standard error is that of the trace.
    """
    land = Landscape(subject, perturbations)
    with land.opened():
        traces = hutchinson(land, generator, progress, MOST_PROBES)
        errors, elements = squared_errors(land)
        linear = np.sum([slopes(land, i) for i in range(len(land))], axis=0) if subject.base else 0.0
    negative = [name for (name, _), t in traces.items() if t.mean < 0]
    if negative:
        warn(f"negative Hessian traces, counted as 0: {', '.join(negative)}")
    found = [traces[p.place] for p in perturbations]
    scale = 0.5 * errors / elements
    notes = {
        "damage": land.damage.name,
        "probes": max((t.probes for t in traces.values()), default=0),
        "probed_alone": [name for (name, _), t in traces.items() if t.alone],
        "negative_traces": negative,
        "largest_relative_error": max((t.relative_error for t in traces.values()), default=0.0),
    }
    mean, error = np.array([(max(t.mean, 0.0), t.standard_error) for t in found]).reshape(-1, 2).T
    return Scores(scale * mean + linear, scale * error, notes=notes)


def hutchinson(land: Landscape, generator: torch.Generator, progress: bool, most: int) -> dict[Place, Trace]:
    """The trace of every place's block: joint probes until every standard error is small, then probes of their own
    for places where it stays large. A joint probe's variance holds that of all other blocks of its rows.
    """
    jointly = Probing(partial(_joint_probe, generator=generator), PRECISE, most, together=True)
    joint = _estimate(land, jointly, list(land.members), progress)
    vague = [place for place, t in joint.items() if t.relative_error > IMPRECISE]
    one_by_one = Probing(partial(_own_probes, generator=generator), IMPRECISE, most, together=False)
    alone = _estimate(land, one_by_one, vague, progress)
    better = {p: Trace(t.mean, t.standard_error, joint[p].probes + t.probes, True) for p, t in alone.items()}
    return joint | {p: t for p, t in better.items() if t.standard_error < joint[p].standard_error}


def _estimate(land: Landscape, how: Probing, places: list[Place], progress: bool) -> dict[Place, Trace]:
    """Probe batch after batch, all of them at least once, until all places are precise enough."""
    samples: dict[Place, list[float]] = {p: [] for p in places}
    least = max(min(LEAST_PROBES, how.most), len(land))
    probed = places
    for n in track(range(max(how.most, len(land))), "Hessian traces", enabled=progress):
        found = how.probe(land, n % len(land), probed)
        for p in probed:
            samples[p].append(found.get(p, 0.0))
        if n + 1 >= least:
            traces = {p: _trace(land, samples[p]) for p in probed}
            vague = [p for p, t in traces.items() if t.standard_error > how.goal * abs(t.mean)]
            probed = probed if how.together and vague else vague
        if not probed:
            break
    return {p: _trace(land, found) for p, found in samples.items()}


def _trace(land: Landscape, samples: Sequence[float]) -> Trace:
    """From each batch's shares of the trace, probed in turn: the sum of their means. Its error takes every probe for
    one of the whole, so that the spread of the data counts too.
    """
    values, count = np.array(samples), len(land)
    shares = land.shares[np.arange(len(values)) % count]
    mean = sum(float(values[i::count].mean()) for i in range(count))
    if len(values) == 1:
        return Trace(mean, abs(mean), 1)
    return Trace(mean, float((values / shares).std(ddof=1)) / len(values) ** 0.5, len(values))


def _joint_probe(land: Landscape, i: int, _: Collection[Place], generator: torch.Generator) -> dict[Place, float]:
    """One probe over all weights, one over all sites: z_j^T (H z)_j of every place, batch ``i``'s share."""
    point = land.point(i)
    found: dict[Place, float] = {}
    for family in (land.layers, land.sites):
        places = [p for p in family if p in point.variables]
        variables = [point.variables[p] for p in places]
        signs = [random_signs(v, generator) for v in variables]
        product = hessian_product(gradients(point.loss, variables), variables, signs)
        found |= {p: inner(z, h) for p, z, h in zip(places, signs, product, strict=True)}
    return found


def _own_probes(land: Landscape, i: int, places: Collection[Place], generator: torch.Generator) -> dict[Place, float]:
    """A probe restricted to each of ``places``: z_j^T H_jj z_j, a double backward each on one graph."""
    point = land.point(i)
    reached = [p for p in places if p in point.variables]
    first = gradients(point.loss, [point.variables[p] for p in reached])
    found = {}
    for p, gradient in zip(reached, first, strict=True):
        signs = random_signs(gradient, generator)
        (product,) = hessian_product([gradient], [point.variables[p]], [signs])
        found[p] = inner(signs, product)
    return found


def squared_errors(land: Landscape) -> tuple[np.ndarray, np.ndarray]:
    """||d||^2 of every perturbation (K), over all samples for sites, and the number of elements it sums over (K)."""
    errors, elements = np.zeros(len(land.perturbations)), np.zeros(len(land.perturbations))
    with torch.no_grad():
        for i in range(len(land)):
            point = land.point(i)
            for k, one in enumerate(land.perturbations):
                if i and not one.place[1]:
                    continue  # a weight is the same in every batch
                moved = land.displacement(k, point)
                if moved is not None:
                    errors[k] += inner(moved, moved)
                    elements[k] += moved.numel()
    return errors, np.maximum(elements, 1)
