"""BAQ's closed form for bits (arXiv 2506.05664), rounded to what is offered and lowered until it fits."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from quantkit.allocation.arrays import Arrays
from quantkit.allocation.problem import Floats, Found, Integers, Problem
from quantkit.allocation.registry import Settings, SolverGaveUp, solver
from quantkit.errors import InvalidRequest
from quantkit.formats import Scheme

_FLOAT_BITS = 32
_TIE = 1e-9
_LEAST_LOG = -100.0


@solver("baq")
def baq(problem: Problem, settings: Settings) -> Found:
    """The nearest widths to b_i = level + log2(c_i / n_i) / 2, at the highest level that fits.

    That is the least sum of c_i 4^-b_i with n_i b_i adding up to the budget; c_i is fitted to the damages, n_i is the
    cost of a bit. Options are named by schemes (InvalidRequest otherwise). Choices whose options cost the same take
    the widest."""
    arrays = Arrays.of(problem)
    bits = np.array([_bits(option.name) for choice in problem.choices for option in choice.options])
    offset, free = _offsets(arrays, bits)

    def rounded(level: float) -> Integers:
        target = level + offset[arrays.choice]
        away = np.where(free[arrays.choice], -_TIE * bits, np.abs(bits - target) + _TIE * bits)
        return arrays.best(away)[1]

    levels = _levels(arrays, bits, offset)
    if not arrays.within(rounded(levels[0])):
        raise SolverGaveUp("The narrowest widths do not meet all limits. Try solver='auto'.")
    fits, breaks = 0, len(levels)
    while breaks - fits > 1:
        middle = (fits + breaks) // 2
        fits, breaks = (middle, breaks) if arrays.within(rounded(levels[middle])) else (fits, middle)
    return Found(arrays.assignment(rounded(levels[fits])))


def _bits(name: str) -> int:
    """Bits of the weight where a scheme has one, else of the activation."""
    try:
        scheme = Scheme.parse(name)
    except InvalidRequest as error:
        raise InvalidRequest(f"baq reads bits from schemes such as w4a8: {error}") from error
    number = scheme.weight or scheme.activation
    return number.bits if number else _FLOAT_BITS


def _offsets(arrays: Arrays, bits: Integers) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """(log2(c / n) / 2 of every choice, whether its options all cost the same)."""
    offset, free = np.zeros(len(arrays.offsets) - 1), np.zeros(len(arrays.offsets) - 1, dtype=bool)
    for i, (start, end) in enumerate(pairwise(arrays.offsets)):
        cost, width, damage = arrays.relative_cost[start:end], bits[start:end], arrays.damage[start:end]
        free[i] = np.ptp(cost) == 0
        harmful = damage > 0
        if not free[i] and np.ptp(width) > 0:
            per_bit = float(np.ptp(cost) / np.ptp(width))
            log_c = float((np.log2(damage[harmful]) + 2 * width[harmful]).mean()) if harmful.any() else -np.inf
            offset[i] = 0.5 * (max(log_c, _LEAST_LOG) - np.log2(per_bit))
    return offset, free


def _levels(arrays: Arrays, bits: Integers, offset: Floats) -> list[float]:
    """The levels between which nothing changes, lowest first, one of each kind."""
    turns = set()
    for i, (start, end) in enumerate(pairwise(arrays.offsets)):
        widths = np.unique(bits[start:end])
        turns.update((0.5 * (widths[1:] + widths[:-1]) - offset[i]).tolist())
    edges = sorted(turns) or [0.0]
    return [edges[0] - 1, *(0.5 * (a + b) for a, b in pairwise(edges)), edges[-1] + 1]
