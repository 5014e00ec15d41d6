"""Corrections after rounding that change no code: biases and scales moved until statistics match the float network's.

Bias correction (Nagel et al., arXiv 1906.04721) gives every channel of a layer's output its float mean back;
para-normalization (Hubara et al., arXiv 2006.10518, "BN tuning") its mean and standard deviation, by a factor on the
weight's scale and on the bias. A factor on the last layer's does to logits what temperature scaling does (Guo et al.,
arXiv 1706.04599): a network that computes with errors should be less sure of its answers than the float one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from quantkit.program.segments import Segment
from quantkit.simulation.model import SimulatedModel
from quantkit.simulation.playback import SimulatedProgram, Values, in_chunks, play

CORRECTIONS = ("auto", "none", "bias", "norm", "tuning", "confidence")
FACTORS = tuple((np.arange(30, 71) / 50).tolist())  # on logits
LEAST_RATIO, MOST_RATIO = 0.5, 2.0  # of standard deviations: beyond, a channel carries next to nothing


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of a layer's output by channel, float64."""

    mean: Tensor
    deviation: Tensor


@torch.no_grad()
def output_spread(runner: SimulatedProgram, block: Segment, name: str, every: Sequence[Values]) -> Spread:
    """The spread of a layer's outputs over all its calls and positions, given the values that enter its block, for
    each size of samples."""
    program = runner.program
    keys = {call.key for call in program.calls[name]}
    count, total, squares = 0.0, *torch.zeros(2, dtype=torch.float64, device="cpu")
    for i in range(block.start, block.stop):
        step = program.steps[i]
        if step.key not in keys:
            continue
        until = block.until(i + 1, step.makes[0])
        for part, _ in chain.from_iterable(in_chunks(program, values) for values in every):
            output = runner.run(part, until).double()
            rows = output.movedim(1, -1) if program.kinds[name].startswith("conv") else output
            rows = rows.reshape(-1, rows.shape[-1])
            count, total, squares = count + len(rows), total + rows.sum(0), squares + rows.square().sum(0)
    mean = total / count
    return Spread(mean, (squares / count - mean.square()).clamp(min=0).sqrt())


def match_outputs(
    runner: SimulatedProgram,
    floats: SimulatedProgram,
    blocks: Sequence[Segment],
    inputs: Sequence[Values],
    deviations: bool,
) -> None:
    """Correct the layers of the simulated model in order, each on what those before it make of ``inputs``, those of
    each size together: the mean of every output channel, with ``deviations`` its standard deviation too. Layers
    without a bias stay, as do those without codes.
    """
    ours = theirs = inputs
    coded = {name for name, weight in runner.model.weights.items() if weight.integer}
    for block in blocks:
        for name in block.layers:
            if name in coded and runner.model.floats.bias(name) is not None:
                wanted = output_spread(floats, block, name, theirs)
                found = output_spread(runner, block, name, ours)
                _correct(runner.model, name, found, wanted, deviations)
        if block is not blocks[-1]:
            ours = [play(runner, values, block) for values in ours]
            theirs = [play(floats, values, block) for values in theirs]


@torch.no_grad()
def _correct(model: SimulatedModel, name: str, found: Spread, wanted: Spread, deviations: bool) -> None:
    ratio = torch.ones_like(found.mean)
    if deviations:
        tiny = 1e-6 * wanted.deviation.max()
        usable = (found.deviation > tiny) & (wanted.deviation > tiny)
        ratio = torch.where(usable, wanted.deviation / found.deviation, ratio).clamp(LEAST_RATIO, MOST_RATIO)
        weight = model.weights[name]
        assert weight.integer
        model.set_weight(name, weight.with_scale(weight.scale * ratio.to(weight.scale).unsqueeze(1)))
    bias = model.floats.bias(name)
    assert bias is not None
    bias.copy_((bias.double() - found.mean) * ratio + wanted.mean)


def head_of(runner: SimulatedProgram) -> str | None:
    """The layer with codes for its weights whose output is the network's, if that is so."""
    program = runner.program
    last = program.producer.get(program.output)
    coded = (name for name, weight in runner.model.weights.items() if weight.integer)
    heads = (name for name in coded if [call.key for call in program.calls.get(name, ())] == [last])
    return next(heads, None)


def best_factor(damage: Callable[[float], float]) -> float:
    """The factor on outputs with which their mean damage is least."""
    means = {factor: damage(factor) for factor in (1.0, *FACTORS)}
    return min(means, key=means.__getitem__)


@torch.no_grad()
def scale_layer(model: SimulatedModel, name: str, factor: float) -> None:
    """Multiply what a layer computes by a factor, through its scales and its bias."""
    weight, bias = model.weights[name], model.floats.bias(name)
    assert weight.integer
    model.set_weight(name, weight.with_scale(weight.scale * factor))
    if bias is not None:
        bias.mul_(factor)
