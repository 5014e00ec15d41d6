"""Activations that cost a network too much at 8 bits: the layers around them compute in float, from the same codes.

One tensor may make most of the damage: a spectrum whose bands differ by orders of magnitude has one scale at 8 bits.
After rounding, each in turn is left float while the outputs are compared with the float model's on a part of the
calibration inputs (docs/methods/float-activations.md).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor

from quantkit.formats import Scheme
from quantkit.numbers.kinds import AnyRange, AnyWeight
from quantkit.plan import FLOAT, LEFT, Plan
from quantkit.program.inputs import batch_size
from quantkit.program.sites import makers_of_codes, place_sites
from quantkit.progress import notice, track
from quantkit.sensitivity.damage import Reference
from quantkit.sensitivity.float_outputs import columns_of
from quantkit.sensitivity.measure import Subject
from quantkit.simulation.model import SimulatedModel
from quantkit.targets import Target
from quantkit.transforms.prepare import Prepared, leave_float, without_sites

TOLERATED = 2e-3  # of the damage that the same answer to every input would do
LEAST_DAMAGE = 1e-5  # nobody sees less, even where answers hardly differ
LEAST_SHARE = 0.25  # of the damage that has to go with what is left float
MOST_OPERATIONS = 0.25  # of the network's that may be slowed down in all
NEARLY = 0.9  # of what the best takes away: as good, with fewer layers in float
SAMPLES = 64  # to measure on
TRIALS_AND_SAMPLES = 1024  # a network that needs more is not tried
Layers = tuple[str, ...]


@dataclass(frozen=True)
class LeftFloat:
    """Layers that compute in float, the sites that hold no codes then, and the damage before and after."""

    layers: Layers
    sites: tuple[str, ...]
    before: float
    after: float

    def __str__(self) -> str:
        return f"float activations take the damage from {self.before:.2g} to {self.after:.2g}"


@dataclass(frozen=True)
class Trials:
    """A quantized model, which layers of it cost, and the float model's outputs on some batches: ``floats`` are the
    weights of layers whose activations are float anyway. ``progress`` shows a line while they are tried.
    """

    simulated: SimulatedModel
    ready: Prepared
    target: Target
    reference: Reference
    floats: Mapping[str, Tensor]
    progress: bool = False

    def left_float(self, choices: Sequence[Layers]) -> list[LeftFloat]:
        """Those of the ``choices`` to leave float, each taking away a good part of the damage that is left; they are
        float in the model afterwards.
        """
        found: list[LeftFloat] = []
        left, damage = list(choices), self._damage()
        tolerated = max(LEAST_DAMAGE, TOLERATED * spread(self.reference))
        while left and damage > tolerated:
            tried = track(left, "trying activations in float", enabled=self.progress)
            trials = [self._without(layers, found, damage) for layers in tried]
            worth = [trial for trial in trials if self._is_worth_it(trial, found)]
            if not worth:
                break
            best = fewest_layers(worth)
            self._set_float(best.layers, best.sites)
            notice(f"{', '.join(best.layers)}: {best}")
            found.append(best)
            left.remove(best.layers)
            damage = best.after
        if found:
            count, every = len({name for one in found for name in one.layers}), len(self.ready.quantizable)
            notice(
                f"{count} of {every} layers compute in float, no faster than before; rules that name them prevent it"
            )
        gone = {site for one in found for site in one.sites}
        self.simulated.sites = tuple(site for site in self.simulated.sites if site.name not in gone)
        return found

    def _is_worth_it(self, trial: LeftFloat, found: Sequence[LeftFloat]) -> bool:
        """Whether enough of the damage goes for what runs in float then, more, the more of the network's operations
        that are: where damage is spread as they are, nothing is gained by slowing the network down.
        """
        before = {name for one in found for name in one.layers}
        slower, all_slower = (
            self._operations(names) for names in ({*trial.layers} - before, {*trial.layers} | before)
        )
        most = min(1 - LEAST_SHARE, (1 - slower) ** 2)
        return trial.after <= most * trial.before and all_slower <= MOST_OPERATIONS

    def _operations(self, layers: Collection[str]) -> float:
        """The share of the network's multiplications that layers have, without those that are float anyway."""
        ready = self.ready
        each = {name: sum(call.macs for call in ready.program.calls[name]) for name in ready.quantizable}
        coded = sum(each[name] for name in layers if not ready.layers[name].weight_only)
        return coded / max(1, sum(each.values()))

    def _without(self, layers: Layers, found: Sequence[LeftFloat], damage: float) -> LeftFloat:
        """What comes of leaving these layers float beside those that were found before."""
        sites = self._unneeded({*layers, *(name for one in found for name in one.layers)})
        with self._changed(layers, sites):
            return LeftFloat(layers, sites, damage, self._damage())

    def _unneeded(self, layers: Collection[str]) -> tuple[str, ...]:
        """The sites that hold codes for these layers alone."""
        ready = self.ready
        others = [n for n in ready.quantizable if n not in layers and not ready.layers[n].weight_only]
        needed = {site.name for site in place_sites(ready.model, ready.program, self.target, others, ready.float_sums)}
        return tuple(name for name in self.simulated.ranges if name not in needed)

    @contextmanager
    def _changed(self, layers: Layers, sites: Sequence[str]) -> Iterator[None]:
        """The model with layers in float inside the block."""
        ranges, codes = self._set_float(layers, sites)
        try:
            yield
        finally:
            self.simulated.ranges.clear()
            self.simulated.ranges.update(ranges)
            for name, weight in codes.items():
                self.simulated.set_weight(name, weight)

    def _set_float(self, layers: Layers, sites: Sequence[str]) -> tuple[dict[str, AnyRange], dict[str, AnyWeight]]:
        """Leave layers float; returns all ranges, and the codes that are gone: those that only float kernels read.
        Others stay, so that the file is as small.
        """
        simulated, ranges = self.simulated, dict(self.simulated.ranges)
        for site in sites:
            del simulated.ranges[site]
        gone = {name: simulated.weights.pop(name) for name in layers if name in self.floats}
        for name in gone:
            simulated.floats.write(name, self.floats[name])
        return ranges, gone

    def _damage(self) -> float:
        subject = Subject(self.simulated, self.reference.batches, {}, rule=self.reference.damage.rule)
        return self.reference.damage_of(subject.outputs()).mean


def fewest_layers(trials: Sequence[LeftFloat]) -> LeftFloat:
    """Of trials that take away damage, those nearly as good as the best, the one with fewest layers."""
    best = max(trial.before - trial.after for trial in trials)
    good = [trial for trial in trials if trial.before - trial.after >= NEARLY * best]
    return min(good, key=lambda trial: (len(trial.layers), trial.after))


def spread(reference: Reference) -> float:
    """The damage of answering every input by the mean of all float outputs with as many classes: what damage is to be
    compared with, as its unit depends on the outputs.
    """
    means = [_means(column) for column in columns_of(reference.outputs)]
    same = (
        tuple(mean[rows.shape[-1]].expand_as(rows) for mean, rows in zip(means, outputs, strict=True))
        for outputs in reference.outputs
    )
    return reference.damage_of(same).mean


def _means(column: Sequence[Tensor]) -> dict[int, Tensor]:
    """Number of classes -> the mean of all rows that have so many, which follows a length in attention weights."""
    sums: dict[int, Tensor] = {}
    counts: dict[int, int] = {}
    for rows in column:
        classes = rows.shape[-1]
        sums[classes] = sums.get(classes, 0) + rows.sum(0)
        counts[classes] = counts.get(classes, 0) + len(rows)
    return {classes: total / counts[classes] for classes, total in sums.items()}


def choices_of(ready: Prepared, target: Target, layers: Collection[str]) -> list[Layers]:
    """What can be left float: the layers around each site, if they are all among ``layers``, and each of those whose
    activations are float anyway.
    """
    if not layers:
        return []
    around = around_site(ready, target, ready.quantizable).values()
    alone = [(name,) for name in ready.quantizable if ready.layers[name].weight_only]
    return [found for found in dict.fromkeys((*around, *alone)) if found and set(found) <= set(layers)]


def around_site(ready: Prepared, target: Target, layers: Collection[str]) -> dict[str, Layers]:
    """Site -> the layers, among ``layers``, that read it, behind those whose kernels make its codes."""
    if not ready.sites:
        return {}
    makers = makers_of_codes(ready.program, target, [n for n in layers if not ready.layers[n].weight_only])
    readers = {site.name: [name for name in site.consumers if name in layers] for site in ready.sites}
    return {
        site.name: tuple(dict.fromkeys((*makers.get(site.place, ()), *readers[site.name]))) for site in ready.sites
    }


def to_measure(reference: Reference, choices: Sequence[Layers]) -> Reference | None:
    """The batches to measure on, evenly spread over all; None where trying all choices in turn would take long."""
    batches = reference.batches
    if not (batches and choices):
        return None
    wanted = max(1, round(SAMPLES * len(batches) / max(1, sum(map(batch_size, batches)))))
    chosen = sorted({i * len(batches) // wanted for i in range(min(wanted, len(batches)))})
    some = replace(reference, batches=[batches[i] for i in chosen], outputs=[reference.outputs[i] for i in chosen])
    too_many = len(choices) * sum(map(batch_size, some.batches)) > TRIALS_AND_SAMPLES
    return None if too_many else some


def weights_read_float(ready: Prepared) -> dict[str, Tensor]:
    """Copies of the weights of quantizable layers whose activations are float anyway."""
    return {n: ready.weights[n].detach().clone() for n in ready.quantizable if ready.layers[n].weight_only}


def with_left_float(plan: Plan, found: Sequence[LeftFloat], ready: Prepared, target: Target) -> tuple[Plan, Prepared]:
    """The plan and the prepared model with these layers left float."""
    schemes, sites, why, reasons = dict(plan.schemes), dict(plan.sites), dict(plan.why), {}
    for one in found:
        for name in one.layers:
            if ready.layers[name].weight_only:
                schemes[name], reasons[name] = Scheme(), LEFT
            else:
                schemes[name] = schemes[name].with_activation(None)
            why[name] = f"{schemes[name]}: {one}"
        sites |= dict.fromkeys(one.sites, FLOAT)
    if reasons:
        ready, plan = leave_float(ready, target, (), reasons), replace(plan, size_bytes=0)
    ready = without_sites(ready, [site for one in found for site in one.sites])
    return replace(plan, schemes=schemes, sites=sites, why=why), ready
