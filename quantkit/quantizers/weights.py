"""From a layer's float weight to its codes in one or several formats: ranges first, then rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.formats import WeightFormat
from quantkit.kernels.reference import QuantizedWeight, quantize
from quantkit.progress import warn
from quantkit.quantizers.gptq import InverseFactor, gptq_codes, inverse_factor
from quantkit.quantizers.weight_ranges import mse_range

ROUNDINGS = ("auto", "nearest", "gptq")
STRETCH = torch.linspace(0.8, 1.6, 17)
_ELEMENTS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Rounded:
    """A layer's codes per format and how they were found: the rounding used and the damping its Hessian needed."""

    weights: dict[WeightFormat, QuantizedWeight]
    rounding: str
    damping: float = 0.0


def quantize_weight(
    weight: Tensor, formats: Sequence[WeightFormat], hessian: Tensor | None = None, groups: int = 1
) -> Rounded:
    """Codes of ``weight`` (output channels first) in each format.

    With ``hessian`` (groups, K, K), the sum of X^T X over the layer's inputs, rounding is GPTQ, with one factorization
    for all formats. Without it, or where it cannot be factored, rounding is to nearest with ranges of least squared
    error. ``groups`` is the convolution's. Computed in float32 unless the weight is float64.
    """
    rows = weight.detach().reshape(groups, weight.shape[0] // groups, -1)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    factor = None if hessian is None else inverse_factor(hessian)
    found = {}
    for format in formats:
        if factor is None or hessian is None:
            codes, scale, zero = _nearest(rows, format)
        else:
            codes, scale, zero = _gptq(rows, format, hessian, factor)
        shape = (weight.shape[0], -1)
        found[format] = QuantizedWeight(
            codes=codes.reshape(weight.shape).to(torch.int8),
            scale=scale.reshape(shape).float(),
            zero_point=zero.reshape(shape).to(torch.int8) if format.zero_point else None,
            format=format,
        )
    return Rounded(found, "nearest" if factor is None else "gptq", 0.0 if factor is None else factor.damping)


def rounding_note(layer: str, rounded: Rounded, asked: str) -> str:
    """One phrase on how a layer was rounded; warns where GPTQ was asked for and could not be had."""
    if rounded.rounding == "nearest" and asked != "nearest":
        warn(f"{layer}: the Hessian of its inputs cannot be factored; rounded to nearest")
    return f"gptq, damping {rounded.damping:g}" if rounded.rounding == "gptq" else rounded.rounding


def _ranges(rows: Tensor, format: WeightFormat, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and zero point (groups, O, scales) of ``rows`` (groups, O, K); ``importance`` is (groups, 1, K)."""
    blocks = (*rows.shape[:2], -1, format.group or rows.shape[2])
    if importance is not None:
        importance = importance.expand_as(rows).reshape(blocks)
    scale, zero = mse_range(rows.reshape(blocks), format, importance)
    return scale.squeeze(-1), zero.squeeze(-1)


def _spread(per_group: Tensor, rows: Tensor) -> Tensor:
    """Scales (..., scales) repeated to one per weight (..., K)."""
    return per_group.repeat_interleave(rows.shape[-1] // per_group.shape[-1], dim=-1)


def _nearest(rows: Tensor, format: WeightFormat) -> tuple[Tensor, Tensor, Tensor]:
    scale, zero = _ranges(rows, format)
    return quantize(rows, _spread(scale, rows), _spread(zero, rows), *format.code_range), scale, zero


def _gptq(rows: Tensor, format: WeightFormat, hessian: Tensor, factor: InverseFactor) -> tuple[Tensor, Tensor, Tensor]:
    """GPTQ under several scales around the one of least weighted squared error, keeping the best for each row.

    The best scale for rounded-and-corrected codes is not that of codes rounded alone: at 2 bits it is about 1.2 times
    larger. Rows are independent, so they are tried in slices that bound memory.
    """
    factor = InverseFactor(factor.upper.to(rows.dtype), factor.dead, factor.damping)
    scale, zero = _ranges(rows, format, hessian.diagonal(dim1=-2, dim2=-1).unsqueeze(1).to(rows.dtype))
    stretch = STRETCH.to(rows.dtype).reshape(-1, 1, 1, 1)
    step = max(1, _ELEMENTS_AT_ONCE // (len(STRETCH) * rows.shape[0] * rows.shape[2]))
    best_codes, best_scale = [], []
    for some, base, offset in zip(rows.split(step, 1), scale.split(step, 1), zero.split(step, 1), strict=True):
        scales = base * stretch
        codes, loss = gptq_codes(some, factor, scales, offset, *format.code_range)
        best = loss.argmin(0)[None, ..., None]
        best_codes.append(codes.gather(0, best.expand(1, *codes.shape[1:]))[0])
        best_scale.append(scales.gather(0, best.expand(1, *scales.shape[1:]))[0])
    return torch.cat(best_codes, 1), torch.cat(best_scale, 1), zero
