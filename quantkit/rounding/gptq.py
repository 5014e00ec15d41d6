"""GPTQ: rounding one input column at a time and letting the columns after it absorb the error.

Frantar et al., "GPTQ" (arXiv 2210.17323), algorithm 1: with H = X^T X over the layer's inputs and U the upper Cholesky
factor of H^-1, column j is rounded, and its error divided by U_jj is spread over later columns along row j of U.
Equal to optimal brain quantization in fixed order. One factorization serves every format of a layer.

A network is rounded layer by layer: ``moments`` in ``by_layers`` sums X^T X over a layer's inputs in the network
quantized so far, ``gptq`` here turns that and the weight into codes, and ``round_by_layers`` puts them into the model
and goes on to the next layer. ``in_sequence`` does the same for models of which only whole forwards can be run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.formats import WeightFormat
from quantkit.numbers.uniform import dequantize, quantize
from quantkit.ranges.weights import group_ranges, per_input
from quantkit.rounding.moments import InverseFactor, Moments, Ordered, damped
from quantkit.rounding.registry import Codes, rounding

# Of the scales of least squared error. The best scale for codes that correct each other is a larger one, at 2 bits by
# about a fifth; the second round looks up to half a step either way from the best of these.
COARSE = (0.9, 1.02, 1.16, 1.32, 1.5)
FINE = (0.92, 0.96, 1.0, 1.04, 1.08)
_RIDGE = 1e-6  # of a scale's curvature
_ELEMENTS_AT_ONCE = 1 << 22


@rounding("gptq", hessian=True, factored=True)
def gptq(rows: Tensor, format: WeightFormat, moments: Moments | None) -> Codes:
    """GPTQ under several scales, coarse to fine, keeping the best for each row.

    Rows are independent, so they are tried in slices that bound memory. Columns are rounded most active first; groups
    and their scales are those of neighbouring inputs all the same ("static groups"), so that kernels need no index of
    groups.
    """
    assert moments is not None and moments.factor is not None
    found = moments.factor.factor
    factor = InverseFactor(found.upper.to(rows.dtype), found.dead, found.damping)
    ordered = Ordered(moments.factor.order, factor)
    hessian = damped(moments.hessian, found.damping).to(rows.dtype)
    importance = moments.hessian.diagonal(dim1=-2, dim2=-1).unsqueeze(1).to(rows.dtype)
    scale, zero = group_ranges(rows, format, importance)

    step = max(1, _ELEMENTS_AT_ONCE // (len(COARSE) * rows.shape[0] * rows.shape[2]))
    slices = zip(rows.split(step, 1), scale.split(step, 1), zero.split(step, 1), strict=True)
    best = [_searched(_Rows(some, format, offset, ordered, hessian), base) for some, base, offset in slices]
    return torch.cat([each.codes for each in best], 1), torch.cat([each.scale for each in best], 1), zero


@dataclass(frozen=True)
class _Trial:
    """Codes (groups, O, K) under scales (groups, O, scales), and the loss of each row (groups, O)."""

    codes: Tensor
    scale: Tensor
    loss: Tensor

    def or_better(self, other: _Trial) -> _Trial:
        """Each row from the trial with the lower loss."""
        better = other.loss < self.loss
        codes = torch.where(better.unsqueeze(-1), other.codes, self.codes)
        scale = torch.where(better.unsqueeze(-1), other.scale, self.scale)
        return _Trial(codes, scale, torch.where(better, other.loss, self.loss))


@dataclass(frozen=True)
class _Rows:
    """Rows to round under the damped ``hessian`` (groups, K, K), with their zero points, in the order of
    ``ordered``.
    """

    weight: Tensor
    format: WeightFormat
    zero: Tensor
    ordered: Ordered
    hessian: Tensor

    def best_of(self, scales: Tensor) -> _Trial:
        """The best for each row of several scales (trials, groups, O, scales)."""
        each = (self._by_column(scales), self._by_column(self.zero))
        rows = self.ordered.sorted(self.weight)
        codes, loss = gptq_codes(rows, self.ordered.factor, *each, *self.format.code_range)
        best = loss.argmin(0)[None, ..., None]
        codes, scale = (x.gather(0, best.expand(1, *x.shape[1:]))[0] for x in (codes, scales))
        return _Trial(self.ordered.restored(codes), scale, loss.amin(0))

    def _by_column(self, per_group: Tensor) -> Tensor:
        """Scales of groups as one per column in the order of rounding; one for all columns stays one."""
        if per_group.shape[-1] == 1:
            return per_group
        return self.ordered.sorted(per_input(per_group, self.weight.shape[-1]))

    def fitted(self, trial: _Trial) -> _Trial:
        """The same codes under the scales of least loss, where that is lower: loss is quadratic in the scales of a
        row.
        """
        steps = trial.codes - per_input(self.zero, self.weight.shape[-1])
        error = self.weight - steps * per_input(trial.scale, self.weight.shape[-1])
        groups = (trial.scale.shape[-1], -1)
        slope = ((error @ self.hessian) * steps).unflatten(-1, groups).sum(-1)
        parts = zip(steps.unflatten(-1, groups).unbind(-2), self.hessian.unflatten(-2, groups).unbind(-3), strict=True)
        curvature = torch.stack([((part @ of) * steps).unflatten(-1, groups).sum(-1) for part, of in parts], -2)

        # A group whose weights are all zero has no curvature: its scale stays.
        diagonal = curvature.diagonal(dim1=-2, dim2=-1)
        ridge = torch.where(diagonal > 0, _RIDGE * diagonal, torch.ones_like(diagonal))
        change = torch.linalg.solve(curvature + torch.diag_embed(ridge), slope)
        change = torch.where((trial.scale + change) * trial.scale > 0, change, torch.zeros_like(change))
        gain = (change * ((curvature @ change.unsqueeze(-1)).squeeze(-1) - 2 * slope)).sum(-1)
        return trial.or_better(_Trial(trial.codes, trial.scale + change, trial.loss + gain))


def _searched(rows: _Rows, scale: Tensor) -> _Trial:
    """The best of trials around ``scale`` with scales fitted to its codes, and of trials around these."""
    coarse, fine = (scale.new_tensor(factors).reshape(-1, 1, 1, 1) for factors in (COARSE, FINE))
    first = rows.fitted(rows.best_of(scale * coarse))
    return first.or_better(rows.fitted(rows.best_of(first.scale * fine)))


def gptq_codes(
    weight: Tensor, factor: InverseFactor, scale: Tensor, zero_point: Tensor, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """Codes of ``weight`` (..., groups, O, K), as floats, rounded along K by GPTQ, and the loss of each row (...,
    groups, O).

    ``scale`` and ``zero_point`` are (..., groups, O, scales), each for K / scales inputs in a row; leading dimensions
    try several of them at once. The loss is e H e^T of the rounding error e under the damped Hessian: the sum of the
    squared scaled errors, column by column.
    """
    size = weight.shape[-1]
    scale, zero_point = torch.broadcast_tensors(scale, zero_point)
    rows = torch.broadcast_shapes(weight.shape[:-1], scale.shape[:-1])
    weight = torch.where(factor.dead.unsqueeze(-2), torch.zeros_like(weight), weight)
    left, scale, zero_point = (_columns(x, rows) for x in (weight, scale, zero_point))
    codes, errors = torch.empty_like(left), torch.empty_like(left)

    share = size // scale.shape[1]
    scales, zeros = scale.split(1, 1), zero_point.split(1, 1)
    spread, pivots = factor.upper.mT.contiguous(), factor.upper.diagonal(dim1=-2, dim2=-1).unsqueeze(-1).split(1, 1)
    by_column = zip(*(x.split(1, 1) for x in (left, codes, errors)), pivots, strict=True)
    for j, (column, code, error, pivot) in enumerate(by_column):
        s, z = scales[j // share], zeros[j // share]
        code.copy_(quantize(column, s, z, low, high))
        torch.div(column - dequantize(code, s, z), pivot, out=error)

        # As many errors as the largest power of two that divides the number of columns done are moved to as many
        # columns ahead: each error reaches each later column once, most of them in large products.
        done = j + 1
        span = done & -done
        ahead = slice(done, min(done + span, size))
        if done < size:
            left[:, ahead].baddbmm_(spread[:, ahead, done - span : done], errors[:, done - span : done], alpha=-1)

    shape = (*rows[:-2], rows[-1])
    loss = errors.square().sum(1)
    return codes.unflatten(2, shape).movedim((0, 1), (-3, -1)), loss.unflatten(1, shape).movedim(0, -2)


def _columns(x: Tensor, rows: torch.Size) -> Tensor:
    """``x`` (..., groups, O, K) with its rows expanded to ``rows``, as (groups, K, all rows): a column in one piece
    of memory.
    """
    return x.expand(*rows, x.shape[-1]).movedim((-3, -1), (0, 1)).flatten(2).contiguous()
