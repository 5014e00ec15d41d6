"""GPTQ: rounding one input column at a time and letting the columns after it absorb the error.

Frantar et al., "GPTQ" (arXiv 2210.17323), algorithm 1: with H = X^T X over the layer's inputs and U the upper Cholesky
factor of H^-1, column j is rounded, and its error divided by U_jj is spread over later columns along row j of U.
Equal to optimal brain quantization in fixed order. One factorization serves every format of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.numbers.uniform import dequantize, quantize

BLOCK = 128
DAMPING = 0.01
MAX_DAMPING = 1.0
PER_OCTAVE = 16


@dataclass(frozen=True)
class InverseFactor:
    """The upper Cholesky factor of the damped inverse Hessian: ``upper`` (groups, K, K), ``dead`` (groups, K) marks
    inputs that were always zero, ``damping`` is the share of the mean diagonal that was needed.
    """

    upper: Tensor
    dead: Tensor
    damping: float


def inverse_factor(hessian: Tensor, damping: float = DAMPING) -> InverseFactor | None:
    """Factor H^-1 for ``hessian`` (groups, K, K); damping grows tenfold until it succeeds, None if it never does.

    Columns whose input is always zero get a unit diagonal: whatever their weight rounds to cannot matter.
    """
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    dead = diagonal <= 0
    alive_mean = diagonal.sum(-1, keepdim=True) / (~dead).sum(-1, keepdim=True).clamp(min=1)
    if not torch.isfinite(hessian).all():
        return None
    while damping <= MAX_DAMPING * 1.0001:
        damped = hessian + torch.diag_embed(torch.where(dead, torch.ones_like(diagonal), damping * alive_mean))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed.any():
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed.any():
                return InverseFactor(upper, dead, damping)
        damping *= 10
    return None


@dataclass(frozen=True)
class Ordered:
    """Columns in the order of rounding, most active inputs first: ``order`` (groups, K) and the factor of the Hessian
    permuted by it. Errors of columns that matter are then left to columns that matter less ("act-order" of the
    authors' code).
    """

    order: Tensor
    factor: InverseFactor

    def sorted(self, x: Tensor) -> Tensor:
        """``x`` (..., groups, O, K) with its columns in the order of rounding."""
        return x.gather(-1, self.order.unsqueeze(-2).expand_as(x))

    def restored(self, x: Tensor) -> Tensor:
        """Columns in the order of rounding back in their places."""
        return x.gather(-1, self.order.argsort(-1).unsqueeze(-2).expand_as(x))


def ordered_factor(hessian: Tensor) -> Ordered | None:
    """The factor of ``hessian`` (groups, K, K) with its inputs sorted by their squares, largest first; inputs within
    a ``PER_OCTAVE``-th of an octave keep their order, so that it does not hang on the last bits of a sum.
    """
    activity = torch.floor(PER_OCTAVE * torch.log2(hessian.diagonal(dim1=-2, dim2=-1)))
    order = activity.sort(dim=-1, descending=True, stable=True).indices
    rows = hessian.gather(1, order.unsqueeze(-1).expand_as(hessian))
    factor = inverse_factor(rows.gather(2, order.unsqueeze(-2).expand_as(hessian)))
    return None if factor is None else Ordered(order, factor)


def gptq_codes(
    weight: Tensor, factor: InverseFactor, scale: Tensor, zero_point: Tensor, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """Codes of ``weight`` (..., groups, O, K), as floats, rounded along K by GPTQ, and the loss of each row (...,
    groups, O).

    ``scale`` and ``zero_point`` are (..., groups, O, scales), each for K / scales inputs in a row; leading dimensions
    try several of them at once. The loss is e H e^T of the rounding error e under the damped Hessian: the sum of the
    squared scaled errors, column by column.
    """
    upper, size = factor.upper, weight.shape[-1]
    scale, zero_point = torch.broadcast_tensors(scale, zero_point)
    rows = torch.broadcast_shapes(weight.shape[:-1], scale.shape[:-1])
    weight = torch.where(factor.dead.unsqueeze(-2), torch.zeros_like(weight), weight)
    left, scale, zero_point = (_columns(x, rows) for x in (weight, scale, zero_point))
    codes, loss = torch.empty_like(left), left.new_zeros(left.shape[0], left.shape[2])
    share = size // scale.shape[1]
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        errors = torch.empty_like(left[:, start:stop])
        for j in range(start, stop):
            s, z = scale[:, j // share], zero_point[:, j // share]
            moved = upper[:, start:j, j].unsqueeze(1) @ errors[:, : j - start]  # by the columns before, in this block
            column = left[:, j] - moved.squeeze(1)
            codes[:, j] = quantize(column, s, z, low, high)
            errors[:, j - start] = (column - dequantize(codes[:, j], s, z)) / upper[:, j, j].unsqueeze(-1)
        loss += errors.square().sum(1)
        left[:, stop:] -= upper[:, start:stop, stop:].mT @ errors
    shape = (*rows[:-2], rows[-1])
    return codes.unflatten(2, shape).movedim((0, 1), (-3, -1)), loss.unflatten(1, shape).movedim(0, -2)


def _columns(x: Tensor, rows: torch.Size) -> Tensor:
    """``x`` (..., groups, O, K) with its rows expanded to ``rows``, as (groups, K, all rows): a column in one piece
    of memory.
    """
    return x.expand(*rows, x.shape[-1]).movedim((-3, -1), (0, 1)).flatten(2).contiguous()
