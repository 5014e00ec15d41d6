"""Learning by gradient descent on small batches, with part of the data held back to tell when it helps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from quantkit.progress import track
from quantkit.reconstruction.snapshot import Cache, Learned

Rated = tuple[Tensor, float]  # what is learned, and its rate
WARM_UP = 10  # steps until rates are reached: Adam's first steps have full length whatever the gradient


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: ``code_rate`` in codes per step, ``scale_rate`` relative, ``bias_rate`` in standard
    deviations of a layer's output. ``checks``: how often on the way it is asked whether it helps. ``averaging``: the
    share of a running mean that stays at each step; 0 is no mean, but the steps themselves. ``epochs``: as many times
    every sample is learned from, in the place of ``steps``.
    """

    steps: int = 300
    batch: int = 64
    code_rate: float = 1e-3
    scale_rate: float = 2e-3
    bias_rate: float = 1e-3
    checks: int = 4
    averaging: float = 0.0
    epochs: float = 0.0

    def on(self, samples: int) -> Schedule:
        """The schedule with its steps for so many samples."""
        return replace(self, steps=max(1, round(self.epochs * samples / self.batch))) if self.epochs else self

    def factor(self, step: int) -> float:
        """Share of the rates at a step: a short warm-up, then half a cosine down to zero."""
        return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / self.steps))


@dataclass(frozen=True)
class LearningOptions:
    """The schedule of everything that is learned, and how many samples it is learned from; ``positions_network`` and
    ``positions_block`` are for models whose output has a row at every position.
    """

    network: Schedule = Schedule(steps=900, batch=32, code_rate=3e-4, checks=12)
    block: Schedule = Schedule(steps=1200, batch=32, code_rate=3e-3)
    layer: Schedule = Schedule(steps=300, checks=20)
    tuning: Schedule = Schedule(steps=100, bias_rate=3e-3)
    positions_network: Schedule = Schedule(batch=8, code_rate=0.0, averaging=0.8, epochs=2)
    positions_block: Schedule = Schedule(batch=8, code_rate=6e-3, scale_rate=1e-3, epochs=8)
    averaging: float = 0.98  # where codes stay: a mean of codes that move rounds to codes that no step has tried
    held_back: int = 8  # one sample in so many
    draws: int = 16  # mixes of each sample for learning the network
    few_draws: int = 4  # for blocks, whose values all draws take room for, and of samples that are held back
    drawn_bytes: int = 1 << 28
    changed_samples: int = 256  # on which it is asked how harmless a change is
    layer_samples: int = 1024
    statistics_samples: int = 512

    def of_blocks_and_network(self, positions: bool) -> tuple[Schedule, Schedule]:
        """The schedule of blocks, and that of the network."""
        return (self.positions_block, self.positions_network) if positions else (self.block, self.network)


@dataclass(frozen=True)
class Training:
    """How one thing is learned: its draws come from ``generator``, and finished pieces are kept in ``cache``."""

    schedule: Schedule
    generator: torch.Generator
    progress: bool = True
    cache: Cache = field(default_factory=Cache)


def shuffled(count: int, batch: int, steps: int, generator: torch.Generator) -> list[Tensor]:
    """The samples of each step: every sample once before any comes again."""
    order = torch.empty(0, dtype=torch.int64, device="cpu")
    found = []
    for _ in range(steps):
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(count, generator=generator, device="cpu")])
        found.append(order[:batch])
        order = order[batch:]
    return found


def learn(
    rated: Sequence[Rated],
    losses: Callable[[Tensor], Iterable[Tensor]],
    held_back: Callable[[], float],
    samples: int,
    training: Training,
    title: str = "",
) -> Learned:
    """Move the tensors of ``rated`` (with their rates) by Adam to lower the sum of ``losses(indices)``, which are
    differentiated one by one, and leave them at their running mean where ``held_back()`` of it was lowest, or as they
    were: it is asked before and the schedule's ``checks`` times on the way. Steps on small batches wander about what
    they are after, and their mean does less (Izmailov et al., arXiv 1803.05407). ``rated`` may be empty, as biases are
    where layers have none.
    """
    schedule, before = training.schedule.on(samples), held_back()
    if not rated:
        return Learned(before, before)
    tensors = [tensor for tensor, _ in rated]
    optimizer = torch.optim.Adam([{"params": [t], "lr": rate} for t, rate in rated], betas=(0.9, 0.99))
    lowest, best = before, _copies(tensors)
    means = best
    draws = shuffled(samples, schedule.batch, schedule.steps, training.generator)
    for step, indices in enumerate(track(draws, title, enabled=training.progress)):
        for group, (_, rate) in zip(optimizer.param_groups, rated, strict=True):
            group["lr"] = rate * schedule.factor(step)
        optimizer.zero_grad()
        with torch.enable_grad():
            for loss in losses(indices):
                loss.backward()
        optimizer.step()
        means = [m.lerp(t.detach(), 1 - schedule.averaging) for m, t in zip(means, tensors, strict=True)]
        if (step + 1) % max(1, schedule.steps // schedule.checks) == 0:
            now = _copies(tensors)
            _set(tensors, means)
            if (found := held_back()) < lowest:
                lowest, best = found, means
            _set(tensors, now)
    _set(tensors, best)
    return Learned(before, lowest)


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


@torch.no_grad()
def _set(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
