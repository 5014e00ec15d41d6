"""GPTAQ: GPTQ of the weight that makes up for what is wrong with the layer's inputs in the quantized network."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.formats import WeightFormat
from quantkit.rounding.gptq import gptq
from quantkit.rounding.moments import Moments
from quantkit.rounding.registry import Codes, rounding

RIDGE = 0.01  # of the mean diagonal


@rounding("gptaq", hessian=True, cross=True, factored=True, minifloats=True)
def gptaq(rows: Tensor, format: WeightFormat, moments: Moments | None) -> Codes:
    """GPTQ of the matched weight; of the weight itself where inputs of one network alone are known."""
    if moments is not None and moments.cross is not None:
        found = matched(moments.blocks.cut(rows), moments.hessian, moments.cross)
        rows = moments.blocks.joined(found, rows.shape[-1])
    return gptq(rows, format, moments)


def matched(rows: Tensor, hessian: Tensor, cross: Tensor) -> Tensor:
    """The weight (groups, O, K) whose outputs on the quantized network's inputs are nearest to those of ``rows`` on
    the float network's: W + W (C - H) (H + r I)^-1 with H = X^T X and C = Y^T X.

    What GPTAQ (Li et al., arXiv 2504.02692) adds to GPTQ column by column, and the ridge solution of RepQuant's
    quantized-weight reconstruction (arXiv 2402.05628).
    """
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    ridge = torch.where(mean > 0, RIDGE * mean, torch.ones_like(mean)) * torch.eye(
        hessian.shape[-1], dtype=hessian.dtype, device=hessian.device
    )
    change = rows.to(hessian) @ (cross - hessian)
    return rows + torch.linalg.solve(hessian + ridge, change.mT).mT.to(rows)
