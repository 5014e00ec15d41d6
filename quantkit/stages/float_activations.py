"""Layers that a scheme for every layer costs too much: they compute in float, from the same codes where they have any.

One layer may make most of the damage: a spectrum whose bands differ by orders of magnitude has one scale at 8 bits.
After rounding, each layer in turn is left float while the outputs are compared with the float model's on a part of the
calibration inputs (docs/methods/float-activations.md).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor

from quantkit.formats import Scheme
from quantkit.numbers.kinds import AnyRange
from quantkit.numbers.uniform import QuantizedWeight
from quantkit.plan import FLOAT, LEFT, Plan
from quantkit.program.inputs import batch_size
from quantkit.program.sites import place_sites
from quantkit.progress import notice
from quantkit.sensitivity.damage import Reference
from quantkit.sensitivity.measure import Subject
from quantkit.simulation.model import SimulatedModel
from quantkit.targets import Target
from quantkit.transforms.prepare import Prepared, leave_float, without_sites

TOLERATED = 5e-4  # of damage: a relative error of the outputs of 3 %
LEAST_SHARE = 0.25  # of the damage that a layer left float has to take away
SAMPLES = 64  # to measure on
LAYERS_AND_SAMPLES = 1024  # more are not run for one layer after the other


@dataclass(frozen=True)
class LeftFloat:
    """A layer that computes in float, the sites that hold no codes then, and the damage before and after."""

    layer: str
    sites: tuple[str, ...]
    before: float
    after: float

    def __str__(self) -> str:
        return f"computes in float, which takes the damage from {self.before:.2g} to {self.after:.2g}"


@dataclass(frozen=True)
class Trials:
    """A quantized model, which layers of it cost, and the float model's outputs on some batches: ``floats`` are the
    weights of layers whose activations are float anyway.
    """

    simulated: SimulatedModel
    ready: Prepared
    target: Target
    reference: Reference
    floats: Mapping[str, Tensor]

    def left_float(self, layers: Collection[str]) -> list[LeftFloat]:
        """The layers among ``layers`` to leave float, each taking away a good part of what is left; they are float in
        the model afterwards.
        """
        found: list[LeftFloat] = []
        left, damage = list(layers), self._damage()
        while left and damage > TOLERATED:
            trials = [self._without(name, [one.layer for one in found], damage) for name in left]
            best = min(trials, key=lambda trial: trial.after)
            if best.after > (1 - LEAST_SHARE) * damage:
                break
            self._set_float(best.layer, best.sites)
            notice(f"{best.layer} {best}")
            found.append(best)
            left.remove(best.layer)
            damage = best.after
        gone = {site for one in found for site in one.sites}
        self.simulated.sites = tuple(site for site in self.simulated.sites if site.name not in gone)
        return found

    def _without(self, name: str, before: Sequence[str], damage: float) -> LeftFloat:
        """What comes of leaving one more layer float."""
        sites = self._unneeded([name, *before])
        with self._changed(name, sites):
            return LeftFloat(name, sites, damage, self._damage())

    def _unneeded(self, layers: Collection[str]) -> tuple[str, ...]:
        """The sites that hold codes for these layers alone."""
        ready = self.ready
        others = [n for n in ready.quantizable if n not in layers and not ready.layers[n].weight_only]
        needed = {site.name for site in place_sites(ready.model, ready.program, self.target, others, ready.float_sums)}
        return tuple(name for name in self.simulated.ranges if name not in needed)

    @contextmanager
    def _changed(self, name: str, sites: Sequence[str]) -> Iterator[None]:
        """The model with a layer in float inside the block."""
        ranges, codes = self._set_float(name, sites)
        try:
            yield
        finally:
            self.simulated.ranges.clear()
            self.simulated.ranges.update(ranges)
            if codes is not None:
                self.simulated.set_weight(name, codes)

    def _set_float(self, name: str, sites: Sequence[str]) -> tuple[dict[str, AnyRange], QuantizedWeight | None]:
        """Leave a layer float; returns the ranges and the codes that it had. Codes that only float kernels read are
        given up, others stay: the file is as small.
        """
        simulated, codes = self.simulated, None
        ranges = dict(simulated.ranges)
        for site in sites:
            del simulated.ranges[site]
        if name in self.floats:
            codes = simulated.weights.pop(name)
            simulated.floats.write(name, self.floats[name])
        return ranges, codes

    def _damage(self) -> float:
        subject = Subject(self.simulated, self.reference.batches, {}, rule=self.reference.damage.rule)
        return self.reference.damage_of(subject.outputs()).mean


def to_measure(reference: Reference, layers: Collection[str]) -> Reference | None:
    """The batches to measure on, evenly spread over all; None where trying all layers in turn would take long."""
    batches = reference.batches
    if not (batches and layers):
        return None
    wanted = max(1, round(SAMPLES * len(batches) / max(1, sum(map(batch_size, batches)))))
    chosen = sorted({i * len(batches) // wanted for i in range(min(wanted, len(batches)))})
    some = replace(reference, batches=[batches[i] for i in chosen], outputs=[reference.outputs[i] for i in chosen])
    too_many = len(layers) * sum(map(batch_size, some.batches)) > LAYERS_AND_SAMPLES
    return None if too_many else some


def weights_read_float(ready: Prepared) -> dict[str, Tensor]:
    """Copies of the weights of quantizable layers whose activations are float anyway."""
    return {n: ready.weights[n].detach().clone() for n in ready.quantizable if ready.layers[n].weight_only}


def with_left_float(plan: Plan, found: Sequence[LeftFloat], ready: Prepared, target: Target) -> tuple[Plan, Prepared]:
    """The plan and the prepared model with these layers left float."""
    schemes, sites, why, reasons = dict(plan.schemes), dict(plan.sites), dict(plan.why), {}
    for one in found:
        if ready.layers[one.layer].weight_only:
            schemes[one.layer], reasons[one.layer] = Scheme(), LEFT
        else:
            schemes[one.layer] = schemes[one.layer].with_activation(None)
        why[one.layer] = f"{schemes[one.layer]}: {one}"
        sites |= dict.fromkeys(one.sites, FLOAT)
    if reasons:
        ready, plan = leave_float(ready, target, (), reasons), replace(plan, size_bytes=0)
    ready = without_sites(ready, [site for one in found for site in one.sites])
    return replace(plan, schemes=schemes, sites=sites, why=why), ready
