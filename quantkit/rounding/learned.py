"""Rounding learned from a layer's Hessian: AdaRound and sign-gradient rounding, without running the layer.

The squared error of a layer's outputs is e H e^T for the rounding error e of a row, H = X^T X over its inputs. So the
gradient of the whole calibration set costs one product with H, whatever the number of samples.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantkit.formats import WeightFormat
from quantkit.numbers.scales import ScaleGrid
from quantkit.numbers.uniform import dequantize, quantize
from quantkit.ranges.weights import group_ranges, per_input
from quantkit.rounding.moments import Moments
from quantkit.rounding.registry import Codes, rounding

STEPS = 300
_STRETCH, _OFFSET = 1.2, 0.1  # of AdaRound's sigmoid, so that it reaches 0 and 1
_ELEMENTS_AT_ONCE = 1 << 19

# e H e^T of every row of an error (groups, O, K) under the Hessian of the layer's inputs: (groups, O, 1)
OutputError = Callable[[Tensor], Tensor]
# Of rows, their format, scales and zero points of every weight, and the output error: codes, and a factor on each
# row's scales
Learn = Callable[[Tensor, WeightFormat, Tensor, Tensor, OutputError], tuple[Tensor, Tensor]]


@rounding("adaround", hessian=True)
def adaround(rows: Tensor, format: WeightFormat, moments: Moments | None) -> Codes:
    """AdaRound on the error of the layer's outputs."""
    return _learned(rows, format, moments, lambda *layer: (adaround_codes(*layer), torch.ones_like(layer[0][..., :1])))


@rounding("signround", hessian=True)
def signround(rows: Tensor, format: WeightFormat, moments: Moments | None) -> Codes:
    """Sign-gradient rounding on the error of the layer's outputs."""
    return _learned(rows, format, moments, signround_codes)


def _learned(rows: Tensor, format: WeightFormat, moments: Moments | None, learn: Learn) -> Codes:
    """Codes learned from the Hessian, in slices that bound memory; a row that nearest rounding serves better keeps
    that.
    """
    assert moments is not None
    output_error = output_error_of(moments, rows.dtype)
    scale, zero = group_ranges(rows, format, moments.squares(rows.shape[-1]).to(rows.dtype))
    size, grid = rows.shape[2], ScaleGrid.of(scale, format)
    step = max(1, _ELEMENTS_AT_ONCE // (rows.shape[0] * size))
    found = []
    for some, base, offset in zip(rows.split(step, 1), scale.split(step, 1), zero.split(step, 1), strict=True):
        each = per_input(base, size), per_input(offset, size)
        nearest = quantize(some, *each, *format.code_range)
        codes, factor = learn(some, format, *each, output_error)
        learned = grid.nearest(base * factor)

        before = output_error(some - dequantize(nearest, *each))
        after = output_error(some - dequantize(codes, per_input(learned, size), each[1]))
        better = after < before
        found.append((torch.where(better, codes, nearest), torch.where(better, learned, base)))
    return torch.cat([codes for codes, _ in found], 1), torch.cat([scales for _, scales in found], 1), zero


def output_error_of(moments: Moments, dtype: torch.dtype) -> OutputError:
    """The output error under the Hessian of these moments, computed in this type."""
    hessian, blocks = moments.hessian.to(dtype), moments.blocks

    def output_error(error: Tensor) -> Tensor:
        error = blocks.cut(error)
        return blocks.summed(((error @ hessian) * error).sum(-1)).unsqueeze(-1)

    return output_error


def _relative(
    weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, output_error: OutputError
) -> Callable[[Tensor], Tensor]:
    """A function of a rounded weight: its output error, row by row in units of that of ``codes``, summed."""
    start = output_error(weight - dequantize(codes, scale, zero))
    unit = torch.where(start > 0, start, torch.ones_like(start))
    return lambda rounded: (output_error(weight - rounded) / unit).sum()


@torch.enable_grad()
def adaround_codes(
    weight: Tensor, format: WeightFormat, scale: Tensor, zero: Tensor, output_error: OutputError
) -> Tensor:
    """Codes of ``weight`` (groups, O, K) rounded up or down as AdaRound learns (Nagel et al., arXiv 2004.10568).

    ``scale`` and ``zero`` have one entry per weight. Every weight is a soft choice between its two neighbours first;
    a penalty that sharpens with time makes it a hard one.
    """
    low, high = format.code_range
    exact = weight / scale + zero
    base = exact.floor().clamp(low, high - 1)
    error_of = _relative(weight, quantize(weight, scale, zero, low, high), scale, zero, output_error)
    share = (exact - base).clamp(0.01, 0.99)
    choice = torch.logit((share + _OFFSET) / _STRETCH).detach().requires_grad_()
    optimizer = torch.optim.Adam([choice], lr=0.05)
    for step in range(STEPS):
        done = step / STEPS
        gate = (_STRETCH * torch.sigmoid(choice) - _OFFSET).clamp(0, 1)
        loss = error_of(dequantize(base + gate, scale, zero))
        undecided = 1 - (2 * gate - 1).abs().pow(20 - 18 * done)
        loss = loss + (10 * done / weight.shape[-1]) * undecided.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return base + (choice.detach() > 0)


@torch.enable_grad()
def signround_codes(
    weight: Tensor, format: WeightFormat, scale: Tensor, zero: Tensor, output_error: OutputError
) -> tuple[Tensor, Tensor]:
    """Codes of ``weight`` (groups, O, K) and a factor (groups, O, 1) on its scales, moved by the sign of their
    gradients with a rate that falls to zero (SignRound, Cheng et al., arXiv 2309.05516); the best of all steps.
    """
    low, high = format.code_range
    error_of = _relative(weight, quantize(weight, scale, zero, low, high), scale, zero, output_error)
    shift = torch.zeros_like(weight).requires_grad_()
    factor = torch.ones_like(weight[..., :1]).requires_grad_()
    best_codes, best_factor = quantize(weight, scale, zero, low, high), factor.detach().clone()
    lowest = output_error(weight - dequantize(best_codes, scale, zero))
    for step in range(STEPS):
        exact = weight / (scale * factor) + zero + shift
        codes = exact.detach().round().clamp(low, high)
        inside = (exact.detach() > low - 0.5) & (exact.detach() < high + 0.5)
        through = torch.where(inside, exact - exact.detach(), torch.zeros_like(exact)) + codes
        rounded = dequantize(through, scale * factor, zero)
        found = output_error(weight - rounded.detach())
        better = found < lowest
        lowest = torch.where(better, found, lowest)
        best_codes = torch.where(better, codes, best_codes)
        best_factor = torch.where(better, factor.detach(), best_factor)
        gradients = torch.autograd.grad(error_of(rounded), [shift, factor])
        rate = (1 - step / STEPS) / STEPS * 2
        with torch.no_grad():
            shift.sub_(rate * gradients[0].sign()).clamp_(-0.5, 0.5)
            factor.sub_(rate * gradients[1].sign() / 2).clamp_(0.5, 1.5)
    return best_codes, best_factor
