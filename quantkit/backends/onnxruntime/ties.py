"""Which entries of a model's outputs the last bits decide: indices of largest values that are equal, classes on either
side of a threshold, and what is picked by them.

Codes make ties frequent, since values on a grid of 256 steps are often the same, and which of two equal ones comes
first is up to the runtime. The simulated model is run again with the last bits of everything it computes disturbed;
an entry that changes is undecided, and says nothing about a file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from quantkit.program.inputs import Batch
from quantkit.program.intercept import INPUT, READ, OpKey
from quantkit.program.outputs import results_of
from quantkit.program.sites import Site, coded_sites
from quantkit.program.updates import plain_mode, restored
from quantkit.simulation.model import SimulatedModel, at_sites

RUNS = 16
LAST_BITS = 2.0**-22  # of a value
HUGE = 1e4  # beyond it a value is taken for a mask's, which is no sum that a runtime could round in another way
Change = Callable[[OpKey, Tensor], Tensor]


def joined(batches: Sequence[Sequence[Tensor | np.ndarray]]) -> list[np.ndarray]:
    """Each output over all batches."""
    return [
        np.concatenate([np.atleast_1d(np.asarray(part)) for part in parts]) for parts in zip(*batches, strict=True)
    ]


def outputs_with(simulated: SimulatedModel, change: Change, batches: Sequence[Batch]) -> list[np.ndarray]:
    """Each output over all batches, with ``change(place, tensor)`` in the place of the sites' quantizers."""
    with plain_mode(simulated.model), restored(simulated.model):
        return joined([_results(simulated, change, batch) for batch in batches])


def _results(simulated: SimulatedModel, change: Change, batch: Batch) -> list[Tensor]:
    args, kwargs = batch
    with simulated.quantizing(change=change):
        return results_of(simulated.model(*args, **kwargs))


class Undecided:
    """The undecided entries of each output of a simulated model on ``batches``, found when they are first asked for.

    ``steps``: what is quantized is also disturbed, by up to that share of a step either way, as integer kernels round
    between layers in their own way.
    """

    def __init__(self, simulated: SimulatedModel, batches: Sequence[Batch], wanted: Sequence[np.ndarray]) -> None:
        self.simulated, self.batches, self.wanted = simulated, batches, wanted
        self.found: dict[float, list[np.ndarray]] = {}

    def entries(self, output: int, steps: float) -> np.ndarray:
        """True where the entry of an output is undecided."""
        if steps not in self.found:
            generator = torch.Generator().manual_seed(0)
            change = _disturbance(self.simulated, steps, generator)
            runs = [outputs_with(self.simulated, change, self.batches) for _ in range(RUNS)]
            self.found[steps] = [
                np.any([differing(run[i], wanted) for run in runs], axis=0) for i, wanted in enumerate(self.wanted)
            ]
        return self.found[steps][output]


def differing(found: np.ndarray, wanted: np.ndarray, allowed: float = 1e-3) -> np.ndarray:
    """The entries that are not the same: of floats those further apart than ``allowed`` times the root mean square."""
    if found.shape != wanted.shape:
        return np.ones(wanted.shape, bool)
    if not np.issubdtype(wanted.dtype, np.floating):
        return np.asarray(found != wanted)
    size = float(np.sqrt(np.mean(np.square(wanted[np.isfinite(wanted)], dtype=np.float64)))) if wanted.size else 0.0
    with np.errstate(invalid="ignore"):
        return ~((np.abs(found - wanted) <= allowed * size) | (found == wanted))


def _disturbance(simulated: SimulatedModel, steps: float, generator: torch.Generator) -> Change:
    """Quantize sites as simulation does, and disturb the last bits of all that calls make; views keep their memory."""

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float32, device="cpu")

    def quantize(site: Site, tensor: Tensor) -> Tensor:
        quantizer = simulated.ranges[site.name]
        if steps:
            # errors are even in half a step either way: on average a quarter of one
            step = (quantizer.fake_quantize(tensor) - tensor).abs().mean() * 4
            tensor = tensor + noise(tensor).clamp(-1, 1) * steps * step
        return quantizer.fake_quantize(tensor)

    quantized = at_sites(coded_sites(simulated.sites, simulated.ranges), quantize)

    def change(place: OpKey, tensor: Tensor) -> Tensor:
        changed = quantized(place, tensor)
        if place.output == READ or place.op == INPUT.op or (tensor._is_view() and changed is tensor):
            return changed
        sizes = changed.abs()
        sizes = sizes.where(sizes < HUGE, 0)
        least = sizes[sizes > 0].min() if bool((sizes > 0).any()) else torch.ones((), dtype=sizes.dtype)
        disturbed = changed + noise(changed) * LAST_BITS * torch.where(sizes > 0, sizes, least)
        return disturbed.where(changed.abs() < HUGE, changed)

    return change
