"""Codes, scales, biases and activation steps while they are being learned: what gradients move, and the quantized
numbers that come of it.

Codes are rounded in the forward and pass their gradient through (Bengio et al., arXiv 1308.3432); steps get the
gradient of LSQ (Esser et al., arXiv 1902.08153), as a factor on the step they started with.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantkit.numbers.ratios import divided, multiplied
from quantkit.numbers.scales import ScaleGrid
from quantkit.numbers.uniform import QuantizedWeight, SiteRange
from quantkit.reconstruction.learning import Rated, Schedule

HALF = 0.49  # of a rounding cell: as far as a learned code starts from the code it has


class _RoundThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.round(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def round_through(x: Tensor) -> Tensor:
    """``x`` rounded; its gradient passes as if it were not."""
    return _RoundThrough.apply(x)


class _StoredThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scale, grid):
        return grid.nearest(scale)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class _LearnedStep(torch.autograd.Function):
    """Fake quantization with gradients for its input, for the logarithm of its scale and for its zero point."""

    @staticmethod
    def forward(ctx, x, log_factor, zero_shift, found):
        scale = found.scale * float(log_factor.exp())
        zero = round(min(max(found.zero_point + float(zero_shift), 0), found.high))
        y = torch.round(x / scale).add_(zero).clamp_(0, found.high).sub_(zero).mul_(scale)
        ctx.save_for_backward(x, y)
        ctx.scale, ctx.reach = scale, scale / 2 * (1 + 1e-5)
        return y

    @staticmethod
    def backward(ctx, gradient):
        x, y = ctx.saved_tensors
        passed = gradient * ((y - x).abs_() <= ctx.reach)
        of_scale = ((gradient * y).sum() - (passed * x).sum()).cpu()  # ranges are learned there
        of_zero = ctx.scale * (passed.sum() - gradient.sum()).cpu() if ctx.needs_input_grad[2] else None
        return passed if ctx.needs_input_grad[0] else None, of_scale, of_zero, None


class LearnedRange:
    """A site's quantizer with a scale that is learned and, with ``joint``, a zero point, which is rounded and clamped,
    so that zero stays a code.
    """

    def __init__(self, start: SiteRange, joint: bool = False) -> None:
        self.start = start
        self.log_factor = torch.zeros((), dtype=torch.float32, requires_grad=True, device="cpu")
        self.zero_shift = torch.zeros((), dtype=torch.float32, requires_grad=joint, device="cpu")

    def fake_quantize(self, x: Tensor) -> Tensor:
        ratio = self.start.ratio
        return multiplied(_LearnedStep.apply(divided(x, ratio), self.log_factor, self.zero_shift, self.start), ratio)

    def rated(self, schedule: Schedule) -> list[Rated]:
        """What is learned, with its rate; zero points move as fast, in codes, as codes do."""
        joint = [(self.zero_shift, schedule.code_rate)] if self.zero_shift.requires_grad else []
        return [(self.log_factor, schedule.scale_rate), *joint]

    def found(self) -> SiteRange:
        """The quantizer as it would ship now."""
        factor = float(self.log_factor.detach().exp())
        scale = float(torch.tensor(self.start.scale * factor, dtype=torch.float32, device="cpu"))
        zero = round(min(max(self.start.zero_point + float(self.zero_shift.detach()), 0), self.start.high))
        return replace(self.start, scale=scale, zero_point=zero)


class LearnedWeight:
    """A layer's weight and bias, from the codes ``start``: each code begins inside its own rounding cell, where the
    float weight is nearest. ``unit`` (output channels) is how far the bias moves for a change of one. Learned on the
    device of the weight; what is ``found`` is on the CPU, as all codes are.
    """

    def __init__(self, weight: Tensor, start: QuantizedWeight, bias: Tensor | None, unit: Tensor) -> None:
        self.start = start = start.on(weight.device)
        self.unit = unit
        rows = (*start.scale.shape, -1)
        scale, self.zero = start.grid()
        codes = start.codes.reshape(rows).float()
        exact = weight.detach().reshape(rows) / scale + self.zero
        self.code = (codes + (exact - codes).clamp(-HALF, HALF)).requires_grad_()
        self.log_factor = torch.zeros_like(start.scale).requires_grad_()
        self.grid = ScaleGrid.of(start.scale, start.format)
        self.bias_start = bias if bias is None else bias.detach().clone()
        self.bias_shift = torch.zeros(
            len(weight), dtype=torch.float32, device=weight.device, requires_grad=bias is not None
        )

    def _codes(self) -> Tensor:
        low, high = self.start.format.code_range
        return round_through(self.code.clamp(low - HALF, high + HALF))

    def zeros(self) -> Tensor:
        """Zero points, a last dimension of one more than the scales."""
        return self.zero

    def _scale(self) -> Tensor:
        """Scales that the format stores; their gradient passes as if they were not rounded."""
        scale: Tensor = _StoredThrough.apply(self.start.scale * self.log_factor.exp(), self.grid)
        return scale

    def value(self) -> Tensor:
        """The weight that a layer computes with."""
        weight = (self._codes() - self.zeros()) * (self._scale().unsqueeze(-1) * self.start.columns())
        return weight.reshape(self.start.codes.shape)

    def bias(self) -> Tensor | None:
        return None if self.bias_start is None else self.bias_start + self.unit * self.bias_shift

    def rated(self, schedule: Schedule) -> list[Rated]:
        """What is learned, with its rate; codes whose rate is zero stay."""
        biases = [] if self.bias_start is None else [(self.bias_shift, schedule.bias_rate)]
        self.code.requires_grad_(schedule.code_rate > 0)
        codes = [(self.code, schedule.code_rate)] if schedule.code_rate > 0 else []
        return [*codes, (self.log_factor, schedule.scale_rate), *biases]

    @torch.no_grad()
    def found(self) -> QuantizedWeight:
        """The codes and scales as they would ship now."""
        codes = self._codes().reshape(self.start.codes.shape).to(torch.int8)
        return replace(self.start, codes=codes, scale=self._scale()).on("cpu")
