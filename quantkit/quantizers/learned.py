"""Codes, scales, biases and activation steps while they are being learned: what gradients move, and the quantized
numbers that come of it.

Codes are rounded in the forward and pass their gradient through (Bengio et al., arXiv 1308.3432); steps get the
gradient of LSQ (Esser et al., arXiv 1902.08153), as a factor on the step they started with.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantkit.kernels.reference import QuantizedWeight, SiteRange

HALF = 0.49  # of a rounding cell: as far as a learned code starts from the code it has


class _RoundThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.round(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class _LearnedStep(torch.autograd.Function):
    """Fake quantization with gradients for its input and for the logarithm of its scale."""

    @staticmethod
    def forward(ctx, x, log_factor, found):
        scale = found.scale * float(log_factor.exp())
        y = torch.round(x / scale).add_(found.zero_point).clamp_(0, found.high).sub_(found.zero_point).mul_(scale)
        ctx.save_for_backward(x, y)
        ctx.reach = scale / 2 * (1 + 1e-5)
        return y

    @staticmethod
    def backward(ctx, gradient):
        x, y = ctx.saved_tensors
        passed = gradient * ((y - x).abs_() <= ctx.reach)
        return passed, (gradient * y).sum() - (passed * x).sum(), None


class LearnedRange:
    """A site's quantizer with a step that is learned; its zero point stays."""

    def __init__(self, start: SiteRange) -> None:
        self.start = start
        self.log_factor = torch.zeros((), requires_grad=True)

    def fake_quantize(self, x: Tensor) -> Tensor:
        return _LearnedStep.apply(x, self.log_factor, self.start)

    def found(self) -> SiteRange:
        """The quantizer as it would ship now."""
        factor = float(self.log_factor.detach().exp())
        return replace(self.start, scale=float(torch.tensor(self.start.scale * factor, dtype=torch.float32)))


class LearnedWeight:
    """A layer's weight and bias, from the codes ``start``: each code begins inside its own rounding cell, where the
    float weight is nearest. ``unit`` (output channels) is how far the bias moves for a change of one.
    """

    def __init__(self, weight: Tensor, start: QuantizedWeight, bias: Tensor | None, unit: Tensor) -> None:
        self.start, self.unit = start, unit
        rows = (*start.scale.shape, -1)
        zero = torch.zeros_like(start.scale) if start.zero_point is None else start.zero_point.float()
        self.zero = zero.unsqueeze(-1)
        codes = start.codes.reshape(rows).float()
        exact = weight.detach().reshape(rows) / start.scale.unsqueeze(-1) + self.zero
        self.code = (codes + (exact - codes).clamp(-HALF, HALF)).requires_grad_()
        self.log_factor = torch.zeros_like(start.scale).requires_grad_()
        self.bias_start = bias if bias is None else bias.detach().clone()
        self.bias_shift = torch.zeros(len(weight), requires_grad=bias is not None)

    def _codes(self) -> Tensor:
        low, high = self.start.format.code_range
        return _RoundThrough.apply(self.code.clamp(low - HALF, high + HALF))

    def _scale(self) -> Tensor:
        return self.start.scale * self.log_factor.exp()

    def value(self) -> Tensor:
        """The weight that a layer computes with."""
        weight = (self._codes() - self.zero) * self._scale().unsqueeze(-1)
        return weight.reshape(self.start.codes.shape)

    def bias(self) -> Tensor | None:
        return None if self.bias_start is None else self.bias_start + self.unit * self.bias_shift

    @torch.no_grad()
    def found(self) -> QuantizedWeight:
        """The codes and scales as they would ship now."""
        codes = self._codes().reshape(self.start.codes.shape).to(torch.int8)
        return replace(self.start, codes=codes, scale=self._scale())
