"""YAQA: rounding by the loss of the whole network, with errors made up for along inputs and outputs.

Tseng et al., "Model-Preserving Adaptive Rounding" (arXiv 2505.22988): for an error E of a layer's weight the loss of
the network grows by tr(E^T H_out E H_in), H_out (x) H_in being the Kronecker product nearest to the Hessian of the
divergence from the float network (``sensitivity/kronecker.py``). With H^-1 = U^T U and A = diag(U)^-1 U of either, the
weight is rounded entry by entry, and what an entry is off, its row's earlier errors included, is spread over later
entries of its row along A_in, and that over later rows along A_out. GPTQ is the case of H_out = I.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.formats import WeightFormat
from quantkit.numbers.uniform import dequantize, quantize
from quantkit.ranges.weights import group_ranges, per_input, whole_ranges
from quantkit.rounding.gptq import STRETCH, gptq, gptq_under
from quantkit.rounding.moments import Moments, Ordered, ordered_factor
from quantkit.rounding.registry import Codes, rounding

INPUT_DAMPING, OUTPUT_DAMPING = 0.1, 0.3  # of the mean diagonal: a Hessian is no Kronecker product
TILE = 32


@rounding("yaqa", hessian=True, fisher=True)
def yaqa(rows: Tensor, format: WeightFormat, moments: Moments | None) -> Codes:
    """Codes under both factors; GPTQ where that of the outputs is not known. The rows of a table are looked up one at
    a time: their errors do not add up, and they have the ranges of least squared error.
    """
    assert moments is not None
    if moments.table:
        return gptq_under(rows, format, moments, group_ranges(rows, format), STRETCH.new_ones(1))
    sides = None if moments.output is None else Sides.of(moments)
    if sides is None:
        return gptq(rows, format, moments)
    codes, scale, zero = sides.rounded(rows[0], format, *_ranges(rows[0], format, moments))
    return codes.unsqueeze(0), scale.unsqueeze(0), zero.unsqueeze(0)


def _ranges(rows: Tensor, format: WeightFormat, moments: Moments) -> tuple[Tensor, Tensor]:
    """Scales and zero points of a layer's groups, or of its rows."""
    if format.group:
        return whole_ranges(rows, format)
    return group_ranges(rows, format, moments.squares(rows.shape[-1])[0].to(rows.dtype))


@dataclass(frozen=True)
class Sides:
    """Both factors of a layer's Hessian, each in the order of rounding."""

    inputs: Ordered
    outputs: Ordered

    @classmethod
    def of(cls, moments: Moments) -> Sides | None:
        """The factors of these moments; None where one of them has no factor."""
        assert moments.output is not None
        inputs = ordered_factor(moments.hessian, INPUT_DAMPING)
        outputs = ordered_factor(moments.output, OUTPUT_DAMPING)
        return None if inputs is None or outputs is None else cls(inputs, outputs)

    def rounded(self, rows: Tensor, format: WeightFormat, scale: Tensor, zero: Tensor) -> Codes:
        """Codes of ``rows`` (O, K) with these scales and zero points (O, scales)."""
        columns, order = self.inputs.order[0], self.outputs.order[0]
        size = rows.shape[-1]
        sorted_rows, *grid = (x[order][:, columns] for x in (rows, per_input(scale, size), per_input(zero, size)))
        along, across = (_unit(side, rows.dtype) for side in (self.inputs, self.outputs))
        codes = two_sided_codes(sorted_rows, along, across, (grid[0], grid[1]), format.code_range)
        return codes[order.argsort()][:, columns.argsort()], scale, zero


def _unit(side: Ordered, dtype: torch.dtype) -> Tensor:
    """A = diag(U)^-1 U of a factor."""
    upper = side.factor.upper[0]
    return (upper / upper.diagonal().unsqueeze(-1)).to(dtype)


def two_sided_codes(
    weight: Tensor, along: Tensor, across: Tensor, grid: tuple[Tensor, Tensor], code_range: tuple[float, float]
) -> Tensor:
    """Codes of ``weight`` (O, K) given A of the inputs ``along`` rows and of the outputs ``across`` them. ``grid``:
    scale and zero point of each weight.

    Entries on one antidiagonal do not wait for each other, nor do tiles on one antidiagonal of tiles.
    """
    outputs, inputs = weight.shape
    tiles = _Tiles.of(weight, along, across, grid)
    for number in range(tiles.count[0] + tiles.count[1] - 1):
        tiles.round_antidiagonal(number, code_range)
    return tiles.codes[:outputs, :inputs]


@dataclass(frozen=True)
class _Tiles:
    """A weight in tiles, padded to whole ones. ``residual`` is what rounding left of each entry, ``spread`` the
    residuals of a row up to an entry as A_in spreads them to it.
    """

    weight: Tensor
    along: Tensor
    across: Tensor
    scale: Tensor
    zero: Tensor
    codes: Tensor
    residual: Tensor
    spread: Tensor
    count: tuple[int, int]

    @classmethod
    def of(cls, weight: Tensor, along: Tensor, across: Tensor, grid: tuple[Tensor, Tensor]) -> _Tiles:
        rows, columns = (-size % TILE for size in weight.shape)

        def padded(x: Tensor, fill: float = 0.0) -> Tensor:
            return F.pad(x, (0, columns, 0, rows), value=fill)

        whole = padded(weight)
        one, other = (
            torch.block_diag(a, torch.eye(more, dtype=a.dtype, device=a.device))
            for a, more in ((along, columns), (across, rows))
        )
        codes, residual, spread = (torch.zeros_like(whole) for _ in range(3))
        count = (whole.shape[0] // TILE, whole.shape[1] // TILE)
        return cls(whole, one, other, padded(grid[0], 1.0), padded(grid[1]), codes, residual, spread, count)

    def round_antidiagonal(self, number: int, code_range: tuple[float, float]) -> None:
        """Round all tiles (i, number - i)."""
        first, last = max(0, number - self.count[1] + 1), min(self.count[0] - 1, number)
        places = [(i * TILE, (number - i) * TILE) for i in range(first, last + 1)]
        spread = [self.residual[i : i + TILE, :j] @ self.along[:j, j : j + TILE] for i, j in places]
        above = [self.across[:i, i : i + TILE].T @ self.spread[:i, j : j + TILE] for i, j in places]
        left = torch.stack([self._tile(self.weight, i, j) for i, j in places]) - torch.stack(spread)
        rounded = _round_tiles(
            left - torch.stack(above),
            torch.stack(spread),
            torch.stack([self.along[j : j + TILE, j : j + TILE] for _, j in places]),
            torch.stack([self.across[i : i + TILE, i : i + TILE] for i, _ in places]),
            (torch.stack([self._tile(self.scale, *p) for p in places]),
             torch.stack([self._tile(self.zero, *p) for p in places])),
            code_range,
        )  # fmt: skip
        for kept, found in zip((self.codes, self.residual, self.spread), rounded, strict=True):
            for (i, j), tile in zip(places, found, strict=True):
                kept[i : i + TILE, j : j + TILE] = tile

    def _tile(self, x: Tensor, i: int, j: int) -> Tensor:
        return x[i : i + TILE, j : j + TILE]


def _round_tiles(
    left: Tensor,
    spread: Tensor,
    along: Tensor,
    across: Tensor,
    grid: tuple[Tensor, Tensor],
    code_range: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, residuals and ``spread`` of tiles (tiles, TILE, TILE), ``left`` being what is to be rounded of them."""
    codes, residual, across = torch.zeros_like(left), torch.zeros_like(left), across.mT.contiguous()
    every = torch.arange(TILE, device=left.device)
    for number in range(2 * TILE - 1):
        i = every[max(0, number - TILE + 1) : number + 1]
        j = number - i
        scale, zero = grid[0][:, i, j], grid[1][:, i, j]
        target = left[:, i, j]
        code = quantize(target, scale, zero, *code_range)
        rest = target - dequantize(code, scale, zero)
        codes[:, i, j], residual[:, i, j] = code, rest
        moved = rest.unsqueeze(-1) * along[:, j]
        spread[:, i] += moved
        left[:, i] -= moved
        left[:, :, j] -= across[:, :, i] * spread[:, i, j].unsqueeze(1)
    return codes, residual, spread
