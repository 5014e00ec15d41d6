"""GPTQ: rounding one input column at a time and letting the columns after it absorb the error.

Frantar et al., "GPTQ" (arXiv 2210.17323), algorithm 1: with H = X^T X over the layer's inputs and U the upper Cholesky
factor of H^-1, column j is rounded, and its error divided by U_jj is spread over later columns along row j of U.
Equal to optimal brain quantization in fixed order. One factorization serves every format of a layer.

A network is rounded layer by layer: ``moments`` in ``by_layers`` sums X^T X over a layer's inputs in the network
quantized so far, ``gptq`` here turns that and the weight into codes, and ``round_by_layers`` puts them into the model
and goes on to the next layer. ``in_sequence`` does the same for models of which only whole forwards can be run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.formats import WeightFormat
from quantkit.numbers.rounder import Rounder, rounder
from quantkit.numbers.scales import ScaleGrid
from quantkit.numbers.uniform import dequantize
from quantkit.ranges.weights import group_ranges, per_input, whole_ranges
from quantkit.rounding.blocks import Blocks
from quantkit.rounding.moments import InverseFactor, Moments, Ordered
from quantkit.rounding.registry import Codes, rounding

# Of the scales of least squared error: the best scale for codes that correct each other is a larger one, at 2 bits by
# about a fifth.
STRETCH = torch.linspace(0.8, 1.6, 17, dtype=torch.float32, device="cpu")
_ELEMENTS_AT_ONCE = 1 << 22


@rounding("gptq", hessian=True, factored=True, minifloats=True)
def gptq(rows: Tensor, format: WeightFormat, moments: Moments | None) -> Codes:
    """GPTQ under several scales around the one of least weighted squared error, keeping the best for each row; of
    groups with zero points under the range of their weights (docs/methods/weight-ranges.md).
    """
    assert moments is not None
    if format.group and format.zero_point:
        return gptq_under(rows, format, moments, whole_ranges(rows, format), STRETCH.new_ones(1))
    ranges = group_ranges(rows, format, moments.squares(rows.shape[-1]).to(rows.dtype))
    return gptq_under(rows, format, moments, ranges, STRETCH)


def gptq_under(
    rows: Tensor, format: WeightFormat, moments: Moments, ranges: tuple[Tensor, Tensor], stretch: Tensor
) -> Codes:
    """GPTQ under ``ranges``, scales and zero points (groups, O, scales), stretched by the best of several factors in
    each row.

    Rows are independent, so they are tried in slices that bound memory. The blocks of a wide layer are rounded as if
    they were groups of their own, but for the scales, which they share. Columns are rounded most active first; groups
    and their scales are those of neighbouring inputs all the same ("static groups"), so that kernels need no index of
    groups.
    """
    assert moments.factor is not None
    found, blocks, (scale, zero) = moments.factor.factor, moments.blocks, ranges
    factor = InverseFactor(found.upper.to(rows.dtype), found.dead, found.damping)
    ordered = Ordered(moments.factor.order, factor)

    grid, stretch = ScaleGrid.of(scale, format), stretch.to(rows.dtype).reshape(-1, 1, 1, 1)
    step = slice_rows(rows.shape[0], rows.shape[2])
    best_codes, best_scale = [], []
    for some, base, offset in zip(rows.split(step, 1), scale.split(step, 1), zero.split(step, 1), strict=True):
        scales = grid.nearest(base * stretch)
        step_of, zero_of = (_by_column(x, some, ordered, blocks) for x in (scales, offset))
        codes, loss = gptq_codes(ordered.sorted(blocks.cut(some)), factor, step_of, zero_of, rounder(format))
        best = blocks.summed(loss).argmin(0)[None, ..., None]
        of_blocks = best.repeat_interleave(blocks.count, 1)
        kept = codes.gather(0, of_blocks.expand(1, *codes.shape[1:]))[0]
        best_codes.append(blocks.joined(ordered.restored(kept), rows.shape[-1]))
        best_scale.append(scales.gather(0, best.expand(1, *scales.shape[1:]))[0])
    return torch.cat(best_codes, 1), torch.cat(best_scale, 1), zero


def slice_rows(groups: int, inputs: int) -> int:
    """How many rows of each group are tried at once."""
    return max(1, _ELEMENTS_AT_ONCE // (len(STRETCH) * groups * inputs))


def _by_column(per_group: Tensor, rows: Tensor, ordered: Ordered, blocks: Blocks) -> Tensor:
    """Scales of groups as one per column in the order of rounding; one for all columns stays one."""
    if per_group.shape[-1] == 1:
        return per_group.repeat_interleave(blocks.count, -3)
    return ordered.sorted(blocks.cut(per_input(per_group, rows.shape[-1]), fill=1.0))


def gptq_codes(
    weight: Tensor, factor: InverseFactor, scale: Tensor, zero_point: Tensor, nearest: Rounder
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
        code.copy_(nearest(column, s, z))
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
