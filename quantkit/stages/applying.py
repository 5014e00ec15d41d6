"""Meeting a plan as well as possible: ranges of sites, rounding of weights, learning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quantkit.formats import ActivationFormat, Scheme, WeightFormat
from quantkit.numbers.kinds import AnyRange
from quantkit.numbers.logarithmic import LogRange
from quantkit.numbers.per_token import TokenRange
from quantkit.numbers.uniform import SiteRange
from quantkit.program.inputs import Batch, batch_size
from quantkit.program.sites import Site
from quantkit.progress import notice
from quantkit.ranges.activations import RANGES, Histogram
from quantkit.ranges.logarithmic import log_range, squared_error
from quantkit.ranges.statistics import site_histograms
from quantkit.reconstruction.snapshot import Cache
from quantkit.rounding.by_blocks import round_by_blocks
from quantkit.rounding.in_sequence import round_biases, round_in_sequence
from quantkit.sensitivity.measure import damage_for
from quantkit.simulation.model import SimulatedModel
from quantkit.simulation.playback import SimulatedProgram
from quantkit.stages.inputs import Inputs
from quantkit.stages.reconstruct import (
    ADAQUANT,
    ReconstructionPlan,
    correct,
    method_to_learn,
    plan_reconstruction,
    reconstruct,
    require_reconstruction,
    worth_learning,
)
from quantkit.stages.recording import Recording, recording_of
from quantkit.stages.reparameterize import Reparameterization, reparameterization_of
from quantkit.stages.request import require_choices
from quantkit.stages.working_memory import working_memory
from quantkit.transforms.prepare import Prepared

LOG_BITS = 4  # the width that logarithmic codes have a format for: "alog4"


def holds_probabilities(site: Site) -> bool:
    """True for a softmax that only products of activations read."""
    return site.place.op == "softmax" and not site.consumers


@dataclass(frozen=True)
class ApplyOptions:
    """How a plan is met, by the names in ``CHOICES``."""

    rounding: str
    ranges: str
    reconstruction: str
    correction: str
    loss: str
    seed: int
    reparameterization: str

    def __post_init__(self) -> None:
        names = ("rounding", "ranges", "reconstruction", "correction", "loss", "reparameterization")
        require_choices(**{name: getattr(self, name) for name in names})

    def with_inputs(self, inputs: Inputs, schemes: Iterable[Scheme]) -> ApplyOptions:
        """The options for ``schemes``, given the data at hand; raises InvalidRequest for what needs data that is not
        there.
        """
        inputs.require_schemes(schemes)
        inputs.require_none(
            reconstruction=self.reconstruction,
            correction=self.correction,
            reparameterization=self.reparameterization,
        )
        return replace(self, rounding=inputs.rounding(self.rounding))


@dataclass(frozen=True)
class PlanApplication:
    """A float model with the formats of its layers and sites, and what was kept of it to work from."""

    ready: Prepared
    weights: Mapping[str, WeightFormat]
    sites: Mapping[str, ActivationFormat]
    batches: Sequence[Batch]
    recording: Recording | str
    reconstruction: ReconstructionPlan | None
    options: ApplyOptions
    rewritten: Reparameterization

    @classmethod
    def of(
        cls,
        ready: Prepared,
        weights: Mapping[str, WeightFormat],
        sites: Mapping[str, ActivationFormat],
        batches: Sequence[Batch],
        reference: Sequence[Tensor],
        options: ApplyOptions,
        finished: Cache,
    ) -> PlanApplication:
        """Rewrites the model of ``ready`` where that is asked for; it computes what it computed. ``reference`` are its
        outputs. What is ``finished`` is not found again. Raises InvalidRequest where learning is asked for and cannot
        be.
        """
        rewritten = reparameterization_of(
            ready,
            weights,
            sites,
            batches,
            options.reparameterization,
            options.ranges,
            options.seed,
            finished.artefacts,
        )
        rewritten.rewrite(ready.model)
        recording, reconstruction = recording_of(ready, batches), None
        bits = [w.bits for w in weights.values()], [a.bits for a in sites.values()]
        worth = worth_learning(*bits, batches)
        asked = {"reconstruction": options.reconstruction, "correction": options.correction}
        if any(value not in ("auto", "none") or (value == "auto" and worth) for value in asked.values()):
            damage = damage_for(options.loss, torch.cat(list(reference)))
            reconstruction = require_reconstruction(
                plan_reconstruction(ready, recording, damage, options.seed), **asked
            )
        how = (
            "none"
            if options.reconstruction == "auto" and not worth
            else method_to_learn(options.reconstruction, *bits)
        )
        decided = replace(options, reconstruction=how)
        return cls(ready, weights, sites, batches, recording, reconstruction, decided, rewritten)

    def moved_to(self, ready: Prepared) -> PlanApplication:
        """The same for another copy of the float model, which is rewritten too."""
        self.rewritten.rewrite(ready.model)
        return replace(self, ready=ready)

    def quantized(self, progress: bool, finished: Cache) -> tuple[SimulatedModel, dict[str, Any]]:
        """The quantized model, and notes on how it was made. What is ``finished`` is not rounded or learned again."""
        ready, weights = self.ready, self.weights
        simulated = SimulatedModel(ready.model, ready.sites, {}, self._site_ranges(progress))
        simulated.eval()
        notes: dict[str, Any] = self._announced()
        notes["rounding"] = self._round(simulated, progress, finished)
        if self.rewritten.notes:
            notes["reparameterization"] = dict(self.rewritten.notes)
        learning, correcting = self.options.reconstruction, self.options.correction
        if self.reconstruction is not None and learning != "none":
            notes["reconstruction"] = reconstruct(
                self.reconstruction, simulated, ready.trace, learning, progress, finished
            )
        # learned by the damage, biases and scales among it, there is nothing to correct
        learned = "reconstruction" in notes and learning not in ADAQUANT and correcting == "auto"
        if self.reconstruction is not None and correcting != "none" and not learned:
            notes["correction"] = correct(self.reconstruction, simulated, ready.trace, correcting, progress, finished)
        round_biases(simulated, {name: ready.layers[name].inputs for name in weights})
        return simulated, notes

    def _announced(self) -> dict[str, Any]:
        """The working memory, said before it is taken; nothing where the model is not on tape."""
        if isinstance(self.recording, str):
            return {}
        learned = by_blocks = 0
        if self.reconstruction is not None:
            held = len(self.reconstruction.data.held_outputs)
            learned = len(self.reconstruction.data) + held
            if self.options.reconstruction in ("block", *ADAQUANT):
                by_blocks = len(self.reconstruction.block_data) + held
        samples = sum(map(batch_size, self.batches))
        memory = working_memory(self.ready, self.recording, samples, learned, by_blocks)
        notice(str(memory))
        return {"working_bytes": memory.peak_bytes}

    def _site_ranges(self, progress: bool) -> dict[str, AnyRange]:
        ranges: dict[str, AnyRange] = {**self.rewritten.ranges}
        ranges |= {name: TokenRange(asked.bits) for name, asked in self.sites.items() if asked.dynamic}
        others = [site for site in self.ready.sites if site.name not in ranges]
        histograms = site_histograms(self.ready.model, others, self.batches, progress)
        return ranges | {site.name: self._range_of(site, histograms[site.name]) for site in others if histograms}

    def _range_of(self, site: Site, histogram: Histogram) -> SiteRange | LogRange:
        """A site's range; of probabilities the logarithmic one where the plan says so, or may and that errs less."""
        asked = self.sites[site.name]
        uniform = RANGES[self.options.ranges](histogram, asked.bits)
        if not holds_probabilities(site) or asked.bits != LOG_BITS:
            return uniform
        logarithmic = log_range(histogram, asked.bits)
        if asked.is_integer and not self.rewritten.log_probabilities:
            return uniform
        less = squared_error(histogram, logarithmic) < squared_error(histogram, uniform)
        return logarithmic if less or not asked.is_integer else uniform

    def _round(self, simulated: SimulatedModel, progress: bool, finished: Cache) -> dict[str, str]:
        """Give every layer its codes; returns how."""
        trace, how, recording = self.ready.trace, self.options.rounding, self.recording
        if isinstance(recording, str):
            return round_in_sequence(simulated, trace, self.weights, self.batches, how, progress, finished)
        inputs = recording.tape.entering(self.ready.model, recording.samples)
        runner = SimulatedProgram(simulated, recording.tape)
        return round_by_blocks(runner, trace, recording.blocks, self.weights, inputs, how, progress, finished)
