"""Ranges of activations channel by channel, and their clipping learned by what the layers behind make of it
(RepQuant, Li et al., arXiv 2402.05628, "per-channel dual clipping").

Lower and upper bound of a channel are each a share of the way from its mean to its extremes. No runtime has a scale
for each channel of an activation: a rewrite of the network turns these ranges into one (``transforms.norm_ranges``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.numbers.uniform import fake_quantize

SHARES = torch.linspace(1.0, 0.3, 29, dtype=torch.float32, device="cpu")
LARGEST_SHARE = 0.982  # sigmoid(4): where learning a bound that clips nothing starts
STEPS = 300
ROWS = 1024  # of a step
RATE = 1e-2
HELD_BACK = 8  # one row in so many decides whether learning helped


@dataclass(frozen=True)
class ChannelRanges:
    """One scale and one zero point for each channel (the last dimension); zero points are integers, also outside the
    codes, where a channel never comes near zero.
    """

    scale: Tensor
    zero_point: Tensor
    bits: int

    @property
    def high(self) -> int:
        return (1 << self.bits) - 1

    def fake_quantize(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.scale, self.zero_point, 0, self.high)


@dataclass(frozen=True)
class Spread:
    """Mean and extremes of each channel of ``rows``."""

    mean: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Spread:
        return cls(rows.mean(0), rows.amin(0), rows.amax(0))

    def ranges(self, lower: Tensor, upper: Tensor, bits: int) -> ChannelRanges:
        """Ranges whose bounds are these shares of the way from the mean to the extremes."""
        low = self.mean - lower * (self.mean - self.low)
        high = self.mean + upper * (self.high - self.mean)
        scale = (high - low) / ((1 << bits) - 1)
        dead = scale <= torch.finfo(scale.dtype).eps * torch.maximum(low.abs(), high.abs())  # constant channels
        scale = torch.where(dead, torch.where(low == 0, torch.ones_like(low), low.abs()), scale)
        return ChannelRanges(scale, torch.round(-low / scale), bits)


def mse_ranges(rows: Tensor, bits: int) -> tuple[ChannelRanges, Tensor]:
    """Ranges of ``rows`` (N, channels) whose two bounds take the same share, for each channel the one with the least
    squared error; and these shares.
    """
    spread, best, share = Spread.of(rows), None, torch.ones_like(rows[0])
    for trial in SHARES.to(rows):
        found = spread.ranges(trial.expand_as(share), trial.expand_as(share), bits)
        error = (found.fake_quantize(rows) - rows).square().sum(0)
        better = torch.ones_like(share, dtype=torch.bool) if best is None else error < best
        best = error if best is None else torch.minimum(error, best)
        share = torch.where(better, trial, share)
    return spread.ranges(share, share, bits), share


def clipped_ranges(rows: Tensor, weight: Tensor, bits: int, generator: torch.Generator) -> ChannelRanges:
    """Ranges learned so that ``rows`` (N, channels), quantized, give the same products with ``weight`` (outputs,
    channels): the weights of all layers that read them. Starts at those of least squared error and keeps them where
    learning does not lower the error on rows that were held back. Deterministic given the generator.
    """
    held, training = rows[::HELD_BACK], rows[torch.arange(len(rows), device="cpu") % HELD_BACK != 0]
    start, share = mse_ranges(training, bits)
    if len(training) < 2:
        return start
    spread = Spread.of(training)
    first = torch.logit(share.clamp(max=LARGEST_SHARE))
    lower, upper = first.clone().requires_grad_(), first.clone().requires_grad_()
    gram = weight.T @ weight
    optimizer = torch.optim.Adam([lower, upper], lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    for _ in range(STEPS):
        drawn = training[torch.randint(len(training), (min(ROWS, len(training)),), generator=generator, device="cpu")]
        loss = output_error(_differentiable(drawn, spread, lower.sigmoid(), upper.sigmoid(), bits) - drawn, gram)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    learned = spread.ranges(lower.detach().sigmoid(), upper.detach().sigmoid(), bits)
    before, after = (output_error(found.fake_quantize(held) - held, gram) for found in (start, learned))
    return learned if after < before else start


def output_error(error: Tensor, gram: Tensor) -> Tensor:
    """Mean squared error of the products with a weight, from errors (N, channels) of its input and W^T W."""
    return ((error @ gram) * error).sum() / len(error)


def _round(x: Tensor) -> Tensor:
    return x + (torch.round(x) - x).detach()


def _differentiable(x: Tensor, spread: Spread, lower: Tensor, upper: Tensor, bits: int) -> Tensor:
    """``fake_quantize`` by ranges with these shares, with straight-through gradients for the shares."""
    low = spread.mean - lower * (spread.mean - spread.low)
    high = spread.mean + upper * (spread.high - spread.mean)
    scale = ((high - low) / ((1 << bits) - 1)).clamp(min=torch.finfo(x.dtype).tiny)
    zero = _round(-low / scale)
    return ((_round(x / scale) + zero).clamp(0, (1 << bits) - 1) - zero) * scale
