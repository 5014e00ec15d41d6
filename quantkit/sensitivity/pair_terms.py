"""How alike the output shifts of two formats are: the cosines of the Gram matrix, and how far they can be trusted.

The damage of a few hundred inputs is dominated by the few on which the network hesitates, and so are inner products in
its metric: between layers, where they are small, they are mostly sampling noise, which a plan sums over hundreds of
pairs. Two remedies, both decided by the calibration inputs alone. The metric is softened: the distribution p in it is
taken at the lowest temperature at which the terms found on one half of the inputs are found again on the other. And
what noise remains is shrunk away: off-diagonals are multiplied by their reliability (linear shrinkage towards the
diagonal, as in Schaefer and Strimmer, 2005), here the split-half reliability by Spearman and Brown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quantkit.sensitivity.damage import RowDamage

TEMPERATURES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
RELIABLE = 0.9
SLICE_BYTES = 1 << 26


@dataclass(frozen=True)
class PairTerms:
    """``cosines`` (K, K) are positive semi-definite with ones on the diagonal, already shrunk by ``reliability``."""

    cosines: np.ndarray
    temperature: float
    reliability: float


@dataclass(frozen=True)
class Shifts:
    """What perturbations do to one output: the ``shifts`` (K, rows, classes) from ``here`` (rows, classes), and the
    sample that each row belongs to, ``samples`` (rows,).
    """

    damage: RowDamage
    here: Tensor
    shifts: Tensor
    samples: Tensor


def pair_terms(outputs: Sequence[Shifts], owners: Sequence[str]) -> PairTerms:
    """Cosines between the shifts of all outputs together, each in the metric of its own damage.

    ``owners`` (K) tell which entries exclude each other: only pairs of different owners count for the reliability.
    Every other sample goes to one half, however they came in batches; the rows of one sample, which are alike, stay
    together.
    """
    halves = [[(one.samples % 2 == parity).nonzero().flatten() for one in outputs] for parity in (0, 1)]
    for temperature in TEMPERATURES:
        grams = [_gram_of_all(outputs, temperature, half) for half in halves]
        cosines, reliability = shrunk_cosines(grams, owners)
        if reliability >= RELIABLE or not any(one.damage.softens for one in outputs):
            break
    return PairTerms(cosines, temperature, reliability)


def shrunk_cosines(halves: Sequence[np.ndarray], owners: Sequence[str]) -> tuple[np.ndarray, float]:
    """Cosines (K, K) of inner products summed over two halves of the inputs, multiplied off the diagonal by their
    reliability, and that; ``owners`` as for ``pair_terms``.
    """
    apart = np.array([[a != b for b in owners] for a in owners]).reshape(len(owners), len(owners))
    reliability = split_half_reliability(*(_cosines(one)[apart] for one in halves))
    shrunk = reliability * _cosines(halves[0] + halves[1])
    np.fill_diagonal(shrunk, 1)
    return shrunk, reliability


def _gram_of_all(outputs: Sequence[Shifts], temperature: float, rows: Sequence[Tensor]) -> np.ndarray:
    """Inner products over some rows of each output, which weigh as if it had as many rows as the first."""
    parts = [
        len(outputs[0].here) / len(one.here) * gram_matrix(one.damage, one.here, one.shifts, temperature, some)
        for one, some in zip(outputs, rows, strict=True)
    ]
    return np.sum(parts, axis=0)


def gram_matrix(damage: RowDamage, reference: Tensor, shifts: Tensor, temperature: float, rows: Tensor) -> np.ndarray:
    """All inner products (K, K) of the shifts (K, rows, classes) in the metric of the damage, over some ``rows``.

    Summed in float64, some rows at a time to bound memory.
    """
    count = len(shifts)
    step = max(1, SLICE_BYTES // max(1, 8 * count * shifts.shape[-1]))
    total = torch.zeros(count, count, dtype=torch.float64, device="cpu")
    for some in rows.split(step):
        vectors = damage.metric(reference[some], shifts[:, some], temperature).double().flatten(1)
        total += vectors @ vectors.T
    return total.numpy()


def metric_lengths(outputs: Sequence[Shifts], temperature: float = 1.0) -> np.ndarray:
    """Lengths (K) of the shifts in the metric where they start."""
    every = [torch.arange(len(one.here), device="cpu") for one in outputs]
    return np.sqrt(np.diag(_gram_of_all(outputs, temperature, every)) / len(outputs[0].here))


def split_half_reliability(first: np.ndarray, second: np.ndarray) -> float:
    """How much of the variance of a mean over both halves is common to them, 0 to 1: 2 r / (1 + r) with r the
    agreement 2 <a, b> / (<a, a> + <b, b>) of the halves (Spearman 1910, Brown 1910). 1 where there is nothing to
    compare.
    """
    scale = first @ first + second @ second
    if scale == 0:
        return 1.0
    agreement = max(0.0, 2 * float(first @ second) / float(scale))
    return 2 * agreement / (1 + agreement)


def _cosines(matrix: np.ndarray) -> np.ndarray:
    lengths = np.sqrt(np.diag(matrix))
    norms = np.outer(lengths, lengths)
    return np.divide(matrix, norms, out=np.zeros_like(matrix), where=norms > 0)
