"""The inputs a profile measures on, drawn from the calibration set.

Calibration samples are usually training samples, on which a network is overconfident and damage is understated. Convex
mixes of pairs of the same samples are inputs it has not memorised (mixup, Zhang et al., arXiv 1710.09412; here only
the inputs are mixed, labels are not needed). Where inputs cannot be mixed, they are used as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from quantkit.program.inputs import Batch, batch_size, stacked

LEAST, MOST = 0.7, 1.0


def mixed_pairs(batches: Sequence[Batch], generator: torch.Generator) -> list[Batch] | None:
    """Each sample mixed with another, weight uniform in [0.7, 1]; None where inputs are not floating-point tensors
    of one shape per argument, or there are fewer than two samples. Arguments that are no rows of samples stay.
    """
    sizes = [batch_size(batch) for batch in batches]
    samples = stacked(batches) if sum(sizes) >= 2 else None
    leaves, spec = tree_flatten(samples)
    rows = [isinstance(x, Tensor) and x.dim() > 0 for x in leaves]
    if not any(rows) or not all(
        x.is_floating_point() and x.dim() > 1 for x, row in zip(leaves, rows, strict=True) if row
    ):
        return None
    partner = _partners(sum(sizes), generator)
    weight = LEAST + (MOST - LEAST) * torch.rand(sum(sizes), generator=generator, dtype=torch.float32, device="cpu")
    mixed = [
        _mix(x, partner, weight).split(sizes) if row else [x] * len(sizes) for x, row in zip(leaves, rows, strict=True)
    ]
    return [tree_unflatten(list(parts), spec) for parts in zip(*mixed, strict=True)]


def _partners(count: int, generator: torch.Generator) -> Tensor:
    """For each sample another one: a step of one along a random cycle."""
    order = torch.randperm(count, generator=generator, device="cpu")
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    return partner


def _mix(x: Tensor, partner: Tensor, weight: Tensor) -> Tensor:
    weight = weight.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
    return weight * x + (1 - weight) * x[partner]
