"""Learning by gradient descent on small batches, with part of the data held back to tell when it helps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.progress import track

WARM_UP = 10  # steps until rates are reached: Adam's first steps have full length whatever the gradient


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: ``code_rate`` in codes per step, ``scale_rate`` relative, ``bias_rate`` in standard
    deviations of a layer's output. ``checks``: how often on the way it is asked whether it helps. ``averaging``: the
    share of a running mean that stays at each step; 0 is no mean, but the steps themselves.
    """

    steps: int = 300
    batch: int = 64
    code_rate: float = 1e-3
    scale_rate: float = 2e-3
    bias_rate: float = 1e-3
    checks: int = 4
    averaging: float = 0.0

    def factor(self, step: int) -> float:
        """Share of the rates at a step: a short warm-up, then half a cosine down to zero."""
        return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / self.steps))


@dataclass(frozen=True)
class Learned:
    """The loss on held-back data before and after; what was learned is put back where it did not help."""

    before: float
    after: float

    @property
    def helped(self) -> bool:
        return self.after < self.before


def shuffled(count: int, batch: int, steps: int, generator: torch.Generator) -> list[Tensor]:
    """The samples of each step: every sample once before any comes again."""
    order = torch.empty(0, dtype=torch.int64)
    found = []
    for _ in range(steps):
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        found.append(order[:batch])
        order = order[batch:]
    return found


def learn(
    rated: Sequence[tuple[Tensor, float]],
    loss: Callable[[Tensor], Tensor],
    held_back: Callable[[], float],
    samples: int,
    schedule: Schedule,
    generator: torch.Generator,
    title: str = "",
    progress: bool = True,
) -> Learned:
    """Move the tensors of ``rated`` (with their rates) by Adam to lower ``loss(indices)``, and leave them at their
    running mean where ``held_back()`` of it was lowest, or as they were: it is asked before and ``schedule.checks``
    times on the way. Steps on small batches wander about what they are after, and their mean does less (Izmailov et
    al., arXiv 1803.05407). ``rated`` may be empty, as biases are where layers have none.
    """
    before = lowest = held_back()
    if not rated:
        return Learned(before, before)
    tensors = [tensor for tensor, _ in rated]
    optimizer = torch.optim.Adam([{"params": [t], "lr": rate} for t, rate in rated], betas=(0.9, 0.99))
    best = means = _copies(tensors)
    draws = shuffled(samples, schedule.batch, schedule.steps, generator)
    for step, indices in enumerate(track(draws, title, enabled=progress)):
        for group, (_, rate) in zip(optimizer.param_groups, rated, strict=True):
            group["lr"] = rate * schedule.factor(step)
        optimizer.zero_grad()
        with torch.enable_grad():
            loss(indices).backward()
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
