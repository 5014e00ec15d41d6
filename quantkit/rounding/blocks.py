"""Blocks of a layer's inputs. X^T X over all inputs of a wide layer would not fit into memory; then it is kept for the
inputs of each block alone, as if the layer were a sum of narrower ones, and errors are made up for within a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from quantkit.formats import EIGHT_BITS
from quantkit.program.layers import LayerWeight

HESSIAN_BYTES = 1 << 30  # of a layer's X^T X in float64: 11,585 inputs make one block
WIDE, WIDE_BLOCK = 1024, 512  # at 8 bits a layer of more inputs than the first has blocks of the second


@dataclass(frozen=True)
class Blocks:
    """The K inputs of each of a layer's groups as ``count`` runs of ``width`` neighbours, the last maybe short."""

    count: int
    width: int

    def spans(self, inputs: int) -> list[slice]:
        """The inputs of each block, of so many."""
        return [slice(start, min(start + self.width, inputs)) for start in range(0, inputs, self.width)]

    def cut(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """``x`` (..., groups, O, K) as (..., groups x count, O, width), what the last block lacks being ``fill``."""
        if self.count == 1:
            return x
        padded = F.pad(x, (0, self.count * self.width - x.shape[-1]), value=fill)
        return padded.unflatten(-1, (self.count, self.width)).movedim(-2, -3).flatten(-4, -3)

    def joined(self, x: Tensor, inputs: int) -> Tensor:
        """(..., groups x count, O, width) as the (..., groups, O, K) that it was cut from, K being ``inputs``."""
        if self.count == 1:
            return x
        return x.unflatten(-3, (-1, self.count)).movedim(-3, -2).flatten(-2)[..., :inputs]

    def summed(self, x: Tensor) -> Tensor:
        """``x`` (..., groups x count, O) summed over the blocks of each group."""
        return x if self.count == 1 else x.unflatten(-2, (-1, self.count)).sum(-2)


def hessian_limit(weight: LayerWeight, bits: int, most: int = HESSIAN_BYTES) -> int:
    """The most bytes that X^T X of a layer's inputs may take for codes of so many bits, ``most`` in general.

    X^T X of K inputs takes K^2 to sum for each row and K^3 to factor. Errors of 8-bit codes are so small that making
    up for them among all inputs of a wide layer is not worth that (docs/methods/gptq.md).
    """
    inputs = math.prod(weight.shape[1:])
    return most if bits < EIGHT_BITS or inputs <= WIDE else min(most, 8 * weight.groups * inputs * WIDE_BLOCK)


def blocks_of(weight: LayerWeight, most: int = HESSIAN_BYTES) -> Blocks:
    """The fewest blocks whose X^T X are at most ``most`` bytes together, of equal width; all positions of a
    convolution's kernel are in one block, as long as they fit.
    """
    inputs, kernel = math.prod(weight.shape[1:]), math.prod(weight.shape[2:])
    unit = kernel if 8 * weight.groups * inputs * kernel <= most else 1
    fewest = math.ceil(8 * weight.groups * inputs**2 / most)
    for count in range(max(1, fewest), inputs // unit + 1):
        width = unit * math.ceil(inputs // unit / count)
        if 8 * weight.groups * math.ceil(inputs / width) * width**2 <= most:  # the last block has the size of others
            return Blocks(math.ceil(inputs / width), width)
    return Blocks(inputs // unit, unit)
