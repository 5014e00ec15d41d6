"""From a layer's float weight to its codes in one or several formats: ranges first, then rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.formats import WeightFormat
from quantkit.numbers.uniform import QuantizedWeight, dequantize, quantize
from quantkit.program.layers import Weights
from quantkit.progress import warn
from quantkit.ranges.weights import mse_range
from quantkit.rounding.gptq import InverseFactor, Ordered, gptq_codes, ordered_factor
from quantkit.rounding.hqq import hqq_range
from quantkit.rounding.learned import adaround_codes, output_error, signround

ROUNDINGS = ("auto", "nearest", "gptq", "gptaq", "adaround", "signround", "hqq")
WITHOUT_INPUTS = ("nearest", "hqq")
STRETCH = torch.linspace(0.8, 1.6, 17)
RIDGE = 0.01  # of the mean diagonal
_ELEMENTS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Rounded:
    """A layer's codes per format and how they were found: the rounding used and the damping its Hessian needed."""

    weights: dict[WeightFormat, QuantizedWeight]
    rounding: str
    damping: float = 0.0


def quantize_weight(
    weight: Tensor,
    formats: Sequence[WeightFormat],
    hessian: Tensor | None = None,
    groups: int = 1,
    rounding: str = "auto",
    cross: Tensor | None = None,
) -> Rounded:
    """Codes of ``weight`` (output channels first) in each format.

    With ``hessian`` (groups, K, K), the sum of X^T X over the layer's inputs, rounding is GPTQ unless another is
    named, with one factorization for all formats. Without it, or where it cannot be factored, rounding is to nearest
    with ranges of least squared error, or HQQ. ``cross`` (groups, K, K) is the sum of Y^T X, Y the inputs of the float
    network: for "gptaq", which rounds the weight that makes up for the difference. ``groups`` is the convolution's.
    Computed on the CPU, in float32 unless the weight is float64.
    """
    rows = weight.detach().cpu().reshape(groups, weight.shape[0] // groups, -1)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    usable = hessian is not None and rounding not in WITHOUT_INPUTS
    ordered = ordered_factor(hessian) if usable and hessian is not None else None
    factor = None if ordered is None else ordered.factor
    if factor is not None and hessian is not None and cross is not None and rounding == "gptaq":
        rows = matched(rows, hessian, cross)
    chosen = (rounding if rounding in ROUNDINGS[3:] else "gptq") if factor is not None else "nearest"
    chosen = "hqq" if rounding == "hqq" else chosen
    found = {}
    for format in formats:
        if ordered is None or hessian is None:
            codes, scale, zero = _without_inputs(rows, format, chosen)
        elif chosen in _LEARNED:
            codes, scale, zero = _learned(rows, format, hessian, chosen)
        else:
            codes, scale, zero = _gptq(rows, format, hessian, ordered)
        shape = (weight.shape[0], -1)
        found[format] = QuantizedWeight(
            codes=codes.reshape(weight.shape).to(torch.int8),
            scale=scale.reshape(shape).float(),
            zero_point=zero.reshape(shape).to(torch.int8) if format.zero_point else None,
            format=format,
        )
    return Rounded(found, chosen, 0.0 if factor is None else factor.damping)


def rounded_layer(
    floats: Weights, name: str, format: WeightFormat, hessian: Tensor | None, cross: Tensor | None, rounding: str
) -> tuple[QuantizedWeight, str]:
    """A layer's weight in one format, and the note on how it was rounded."""
    rounded = quantize_weight(floats[name], [format], hessian, floats.layers[name].groups, rounding, cross)
    return rounded.weights[format], rounding_note(name, rounded, rounding)


def rounding_note(layer: str, rounded: Rounded, asked: str) -> str:
    """One phrase on how a layer was rounded; warns where its inputs were to be used and could not be."""
    if rounded.rounding == "nearest" and asked != "nearest":
        warn(f"{layer}: the Hessian of its inputs cannot be factored; rounded to nearest")
    return f"{rounded.rounding}, damping {rounded.damping:g}" if "gpt" in rounded.rounding else rounded.rounding


def matched(rows: Tensor, hessian: Tensor, cross: Tensor) -> Tensor:
    """The weight (groups, O, K) whose outputs on the quantized network's inputs are nearest to those of ``rows`` on
    the float network's: W + W (C - H) (H + r I)^-1 with H = X^T X and C = Y^T X.

    What GPTAQ (Li et al., arXiv 2504.02692) adds to GPTQ column by column, and the ridge solution of RepQuant's
    quantized-weight reconstruction (arXiv 2402.05628).
    """
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    ridge = torch.where(mean > 0, RIDGE * mean, torch.ones_like(mean)) * torch.eye(hessian.shape[-1]).to(hessian)
    change = rows.to(hessian) @ (cross - hessian)
    return rows + torch.linalg.solve(hessian + ridge, change.mT).mT.to(rows)


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


def _without_inputs(rows: Tensor, format: WeightFormat, rounding: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes to nearest, with ranges of least squared error or those of HQQ."""
    scale, zero = _ranges(rows, format)
    if rounding == "hqq":
        blocks = rows.reshape(*scale.shape, -1)
        scale, zero = (x.squeeze(-1) for x in hqq_range(blocks, format, scale.unsqueeze(-1), zero.unsqueeze(-1)))
    return quantize(rows, _spread(scale, rows), _spread(zero, rows), *format.code_range), scale, zero


def _learned(rows: Tensor, format: WeightFormat, hessian: Tensor, rounding: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes learned from the Hessian, in slices that bound memory; a row that nearest rounding serves better keeps
    that.
    """
    hessian = hessian.to(rows.dtype)
    scale, zero = _ranges(rows, format, hessian.diagonal(dim1=-2, dim2=-1).unsqueeze(1))
    step = max(1, _ELEMENTS_AT_ONCE // (8 * rows.shape[0] * rows.shape[2]))
    found = []
    for some, base, offset in zip(rows.split(step, 1), scale.split(step, 1), zero.split(step, 1), strict=True):
        each = _spread(base, some), _spread(offset, some)
        nearest = quantize(some, *each, *format.code_range)
        codes, factor = _LEARNED[rounding](some, format, *each, hessian)
        before = output_error(some - dequantize(nearest, *each), hessian)
        after = output_error(some - dequantize(codes, each[0] * factor, each[1]), hessian)
        better = after < before
        found.append((torch.where(better, codes, nearest), torch.where(better, base * factor, base)))
    return torch.cat([codes for codes, _ in found], 1), torch.cat([scales for _, scales in found], 1), zero


def _adaround(
    rows: Tensor, format: WeightFormat, scale: Tensor, zero: Tensor, hessian: Tensor
) -> tuple[Tensor, Tensor]:
    return adaround_codes(rows, format, scale, zero, hessian), torch.ones_like(rows[..., :1])


_LEARNED = {"adaround": _adaround, "signround": signround}


def _gptq(rows: Tensor, format: WeightFormat, hessian: Tensor, ordered: Ordered) -> tuple[Tensor, Tensor, Tensor]:
    """GPTQ under several scales around the one of least weighted squared error, keeping the best for each row.

    The best scale for rounded-and-corrected codes is not that of codes rounded alone: at 2 bits it is about 1.2 times
    larger. Rows are independent, so they are tried in slices that bound memory. Columns are rounded most active first;
    groups and their scales are those of neighbouring inputs all the same ("static groups"), so that kernels need no
    index of groups.
    """
    found = ordered.factor
    factor = InverseFactor(found.upper.to(rows.dtype), found.dead, found.damping)
    scale, zero = _ranges(rows, format, hessian.diagonal(dim1=-2, dim2=-1).unsqueeze(1).to(rows.dtype))
    stretch = STRETCH.to(rows.dtype).reshape(-1, 1, 1, 1)
    step = max(1, _ELEMENTS_AT_ONCE // (len(STRETCH) * rows.shape[0] * rows.shape[2]))
    best_codes, best_scale = [], []
    for some, base, offset in zip(rows.split(step, 1), scale.split(step, 1), zero.split(step, 1), strict=True):
        scales = base * stretch
        step_of, zero_of = (_by_column(x, some, ordered) for x in (scales, offset))
        codes, loss = gptq_codes(ordered.sorted(some), factor, step_of, zero_of, *format.code_range)
        best = loss.argmin(0)[None, ..., None]
        best_codes.append(ordered.restored(codes.gather(0, best.expand(1, *codes.shape[1:]))[0]))
        best_scale.append(scales.gather(0, best.expand(1, *scales.shape[1:]))[0])
    return torch.cat(best_codes, 1), torch.cat(best_scale, 1), zero


def _by_column(per_group: Tensor, rows: Tensor, ordered: Ordered) -> Tensor:
    """Scales of groups as one per column in the order of rounding; one for all columns stays one."""
    return per_group if per_group.shape[-1] == 1 else ordered.sorted(_spread(per_group, rows))
