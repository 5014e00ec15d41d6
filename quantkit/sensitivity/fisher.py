"""Fisher information along all changes and between every two of them, from a fixed number of backward passes.

g_n is the gradient of the log-likelihood of labels by a layer's whole output for sample n, dy_n the shift that a
rounded weight makes in that output, and s_n = <g_n, dy_n>: the inner product over all elements of the sample. The mean
of s_n(k) s_n(l) over samples estimates d_k^T F d_l for every pair of changes (docs/methods/fisher.md), whatever the
number of formats, and is positive semi-definite. Labels are drawn from the model's own distribution, which gives the
true Fisher information, the Hessian of the divergence; true labels would give the empirical one. A sample's rows get
independent labels, so cross terms vanish on average and the sum over its rows may be squared as a whole. What second
order does not know, how strong pair terms are and where damage ends, a few measured plans tell (``saturation``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from quantkit.program.inputs import batch_size, first_samples
from quantkit.progress import track
from quantkit.sensitivity.by_place import members_of
from quantkit.sensitivity.by_segments import passes_for
from quantkit.sensitivity.curvature import Landscape
from quantkit.sensitivity.damage import mean_and_error
from quantkit.sensitivity.first_order import slopes
from quantkit.sensitivity.measure import Perturbation, Scores, Subject
from quantkit.sensitivity.output_gradients import inner_products
from quantkit.sensitivity.pair_terms import shrunk_cosines
from quantkit.sensitivity.registry import Cost, Workload, estimator
from quantkit.sensitivity.saturation import calibrated, plans_measured

LEAST_DRAWS, MOST_DRAWS = 4, 12  # of labels for every sample
PRODUCTS = 512  # inner products of every change that are wanted: a mean square of so many has an error of 6 %
SHARE = 0.5  # of the bytes of a graph, beside which there are the gradients of all draws
LEAST_APART = 128
PLANS_SHARE = 3  # of the whole plans that the Gram matrix is fitted to, one in so many


def draws_for(samples: int) -> int:
    """How often labels are drawn: more often where there are few samples."""
    return max(LEAST_DRAWS, min(MOST_DRAWS, PRODUCTS // max(1, samples)))


def plans_of(formats: int) -> int:
    """How many whole plans are measured for so many formats."""
    return plans_measured(formats) // PLANS_SHARE


def _forwards(work: Workload) -> float:
    return 1 + 2 * draws_for(work.samples) + work.formats / max(1, work.places) + plans_of(work.formats)


@estimator("fisher", Cost(_forwards, keeps_graph=True))
def fisher(
    subject: Subject, perturbations: Sequence[Perturbation], progress: bool, generator: torch.Generator
) -> Scores:
    """One forward and ``draws_for`` backwards of the samples, every layer once per format, and a few whole plans.

    Memory: the graph of a part of a batch (``curvature.GRAPH_BYTES``), and a number for every change, sample and draw.
    The standard error is over samples. Around a base plan there are no pair terms.
    """
    land, draws = _landscape(subject, perturbations), draws_for(sum(map(batch_size, subject.batches)))
    found, linear, passes = [], np.zeros(len(perturbations)), passes_for(land)
    with land.opened():
        for i in track(range(len(land)), "Fisher information", enabled=progress):
            found.append(inner_products(land, i, draws, generator, passes))
            if subject.base:
                linear += slopes(land, i)
    products = torch.cat(found, dim=2)
    squares = products.square().mean(1) * (0.5 * products.shape[2] / land.rows)
    singles = [mean_and_error(row) for row in squares]
    means, errors = np.array(singles).reshape(-1, 2).T.copy()
    notes = {"damage": land.damage.name, "draws": draws}
    if subject.base:
        return Scores(means + linear, errors, notes=notes)
    cosines, reliability = shrunk_cosines(_halves(products), [p.owner for p in perturbations])
    lengths = np.sqrt(2 * means)
    matrix = cosines * np.outer(lengths, lengths)
    np.fill_diagonal(matrix, 2 * means)
    scores = Scores(means, errors, matrix, notes | {"reliability": reliability})
    return calibrated(scores, subject, perturbations, plans_of(len(perturbations)), progress)


def _landscape(subject: Subject, perturbations: Sequence[Perturbation]) -> Landscape:
    """The damage, in ``LEAST_APART`` batches or more where calls do not keep samples apart, as those on (tokens,
    samples, channels) or on all tokens in a row.
    """
    samples = sum(map(batch_size, subject.batches))
    by_weights = bool(subject.base)
    first = replace(subject, batches=[first_samples(batch, 2) for batch in subject.batches[:1]])
    some = [perturbations[own[0]] for own in members_of(perturbations).values()]
    if samples > 1 and not _apart(Landscape(first, some, by_weights=by_weights)):
        return Landscape(subject, perturbations, (), by_weights, SHARE, max(1, samples // LEAST_APART))
    return Landscape(subject, perturbations, (), by_weights, SHARE)


def _apart(land: Landscape) -> bool:
    """Whether the first batch has an inner product for each of its samples."""
    with land.opened():
        count = batch_size(land.subject.batches[0])
        return inner_products(land, 0, 1, torch.Generator().manual_seed(0)).shape[2] == count


def _halves(products: Tensor) -> list[np.ndarray]:
    """Sums of products (K, K) of inner products (K, draws, samples) over every other sample; over every other draw
    where there is one sample.
    """
    axis = 1 if products.shape[2] == 1 else 2
    parts = (products.index_select(axis, torch.arange(p, products.shape[axis], 2, device="cpu")) for p in (0, 1))
    return [(flat @ flat.T).numpy() for flat in (part.flatten(1) for part in parts)]


def try_gradients(subject: Subject) -> None:
    """Differentiate a subject's outputs once by what its layers make. Raises InvalidRequest where that cannot be."""
    land = Landscape(subject, layers=list(subject.floats.layers), by_weights=False)
    generator = torch.Generator().manual_seed(0)
    with land.opened():
        for i in range(len(land)):
            inner_products(land, i, 1, generator)
