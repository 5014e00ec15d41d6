"""Damage of uniform noise as wide as a format's step: sensitivity to a format whatever its rounding.

Rounding to nearest moves a value by at most half a step, about uniformly: w + step * eta with eta uniform in [-0.5,
0.5], variance step^2 / 12 (QuantNAS; docs/methods/noise.md). The step is the format's own, (max - min) / (2^b - 1) of
each range it covers: per output channel or group for weights, per tensor for sites. What clipping costs is not seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from quantkit.numbers.kinds import AnyRange, AnyWeight
from quantkit.sensitivity.by_place import Found, by_place
from quantkit.sensitivity.damage import Reference, average, mean_and_error, notes_on
from quantkit.sensitivity.measure import Perturbation, Scores, Subject, applied
from quantkit.sensitivity.outputs import Outputs
from quantkit.sensitivity.registry import Cost, estimator

DRAWS = 4


@estimator("noise", Cost(lambda work: DRAWS * work.formats + 1))
def noise(
    subject: Subject, perturbations: Sequence[Perturbation], progress: bool, generator: torch.Generator
) -> Scores:
    """Mean damage over ``DRAWS`` draws of noise in place of each perturbation: DRAWS x K forwards of the sample set.

    The standard error joins that over samples with that over draws.
    """
    reference = Reference.of(subject)
    here = reference.damage_of(subject.outputs())
    seeds = torch.randint(1 << 62, (len(perturbations),), generator=generator, device="cpu").tolist()

    def measure(k: int) -> Found:
        own = torch.Generator().manual_seed(seeds[k])
        noisy = [_noisy_outputs(subject, perturbations[k], own) for _ in range(DRAWS)]
        draws = [reference.damage_of(outputs).since(here) for outputs in noisy]
        mean, over_samples = average(draws).mean_and_error
        _, over_draws = mean_and_error(torch.tensor([one.mean for one in draws], dtype=torch.float64, device="cpu"))
        return {"found": np.array([mean, np.hypot(over_samples, over_draws)])}

    found = np.zeros((len(perturbations), 2))
    for k, one in by_place(subject, perturbations, "noise", progress, measure):
        found[k] = one["found"]
    means, errors = found.T.copy()
    return Scores(means, errors, notes=notes_on(subject, reference.damage, here) | {"draws": DRAWS})


def _noisy_outputs(subject: Subject, one: Perturbation, generator: torch.Generator) -> Iterator[Outputs]:
    """Outputs with noise in place of one perturbation; the rest of the base plan stays."""
    weights, at = applied(p for p in subject.base if p.place != one.place)
    if one.change.stored:
        weights[one.owner] = noisy_weight(subject.floats[one.owner], one.change, generator)
    else:
        at[one.owner] = partial(_noisy_site, found=one.change, generator=generator)
    return subject.outputs_with(weights, at)


def _noisy_site(x: Tensor, found: AnyRange, generator: torch.Generator) -> Tensor:
    return _with_noise(x, found.scale if found.static else found.steps(x), generator)


def noisy_weight(weight: Tensor, codes: AnyWeight, generator: torch.Generator) -> Tensor:
    """``weight`` plus uniform noise as wide as the steps of ``codes``; nothing where a step is 0."""
    return _with_noise(weight.detach(), codes.steps().to(weight), generator)


def _with_noise(x: Tensor, step: Tensor | float, generator: torch.Generator) -> Tensor:
    return x + step * (torch.rand(x.shape, generator=generator, dtype=torch.float32, device="cpu").to(x) - 0.5)
