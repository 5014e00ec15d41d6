"""What rounding knows of a layer's inputs: their second moments, and the factor that GPTQ works with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from quantkit.rounding.blocks import Blocks

DAMPING = 0.01
MAX_DAMPING = 1.0
PER_OCTAVE = 16


@dataclass(frozen=True)
class Moments:
    """Of a layer's inputs X in the quantized network: the sum of X^T X, (groups, K, K) float64, and where it was asked
    for that of Y^T X, Y its inputs in the float network. Of a wide layer, whose inputs are in ``count`` blocks, these
    are (groups x count, width, width).

    Beside the factor of its ``output`` (1, O, O), ``hessian`` is that of its inputs in the Kronecker product nearest
    to the Hessian of the network's loss; of a ``table``, whose rows are looked up, it is that of the loss by any row.
    """

    hessian: Tensor
    cross: Tensor | None = None
    count: int = 1
    output: Tensor | None = None
    table: bool = False

    @property
    def blocks(self) -> Blocks:
        return Blocks(self.count, self.hessian.shape[-1])

    @cached_property
    def factor(self) -> Ordered | None:
        """The factor of the Hessian, one for all formats of a layer; None where there is none."""
        return ordered_factor(self.hessian) if self.count == 1 else _block_by_block(self.hessian)

    def divided(self, ratio: Tensor) -> Moments:
        """Those of the inputs divided by ``ratio`` (K,)."""
        each = self.blocks.cut(ratio.double().reciprocal().expand(1, 1, -1), fill=1.0)
        both = each * each.transpose(-2, -1)
        cross = None if self.cross is None else self.cross * both
        return replace(self, hessian=self.hessian * both, cross=cross)

    def squares(self, inputs: int) -> Tensor:
        """The sum of the squares of each input, (groups, 1, K)."""
        return self.blocks.joined(self.hessian.diagonal(dim1=-2, dim2=-1).unsqueeze(-2), inputs)


@dataclass(frozen=True)
class InverseFactor:
    """The upper Cholesky factor of the damped inverse Hessian: ``upper`` (groups, K, K), ``dead`` (groups, K) marks
    inputs that were always zero, ``damping`` is the share of the mean diagonal that was needed.
    """

    upper: Tensor
    dead: Tensor
    damping: float


def inverse_factor(hessian: Tensor, damping: float = DAMPING) -> InverseFactor | None:
    """Factor H^-1 for ``hessian`` (groups, K, K); damping grows tenfold until it succeeds, None if it never does."""
    if not torch.isfinite(hessian).all():
        return None
    while damping <= MAX_DAMPING * 1.0001:
        lower, failed = torch.linalg.cholesky_ex(damped(hessian, damping))
        if not failed.any():
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed.any():
                return InverseFactor(upper, hessian.diagonal(dim1=-2, dim2=-1) <= 0, damping)
        damping *= 10
    return None


def damped(hessian: Tensor, damping: float) -> Tensor:
    """``hessian`` with a share of its mean live diagonal added. Inputs that are always zero get a unit diagonal:
    whatever their weight rounds to cannot matter.
    """
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    dead = diagonal <= 0
    alive_mean = diagonal.sum(-1, keepdim=True) / (~dead).sum(-1, keepdim=True).clamp(min=1)
    return hessian + torch.diag_embed(torch.where(dead, torch.ones_like(diagonal), damping * alive_mean))


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


def ordered_factor(hessian: Tensor, damping: float = DAMPING) -> Ordered | None:
    """The factor of ``hessian`` (groups, K, K) with its inputs sorted by their squares, largest first; inputs within
    a ``PER_OCTAVE``-th of an octave keep their order, so that it does not hang on the last bits of a sum.
    """
    activity = torch.floor(PER_OCTAVE * torch.log2(hessian.diagonal(dim1=-2, dim2=-1)))
    order = activity.sort(dim=-1, descending=True, stable=True).indices
    rows = hessian.gather(1, order.unsqueeze(-1).expand_as(hessian))
    factor = inverse_factor(rows.gather(2, order.unsqueeze(-2).expand_as(hessian)), damping)
    return None if factor is None else Ordered(order, factor)


def _block_by_block(hessian: Tensor) -> Ordered | None:
    """``ordered_factor`` of matrices that are each damped as much as it needs; while one is being factored, no copies
    of the others are held.
    """
    upper, order = torch.empty_like(hessian), torch.empty(hessian.shape[:2], dtype=torch.int64, device="cpu")
    dead, damping = torch.empty_like(order, dtype=torch.bool), 0.0
    for i, block in enumerate(hessian.split(1)):
        found = ordered_factor(block)
        if found is None:
            return None
        upper[i], order[i], dead[i] = found.factor.upper[0], found.order[0], found.factor.dead[0]
        damping = max(damping, found.factor.damping)
    return Ordered(order, InverseFactor(upper, dead, damping))
