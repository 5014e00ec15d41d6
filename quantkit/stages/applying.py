"""Meeting a plan as well as possible: ranges of sites, rounding of weights, learning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from quantkit.numbers.kinds import AnyRange, token_range
from quantkit.numbers.logarithmic import LogRange
from quantkit.numbers.uniform import SiteRange
from quantkit.program.integer_biases import bias_calls
from quantkit.program.sites import Site
from quantkit.progress import notice
from quantkit.ranges.activations import RANGES, Histogram
from quantkit.ranges.logarithmic import log_range, squared_error
from quantkit.ranges.statistics import site_histograms
from quantkit.reconstruction.snapshot import Cache
from quantkit.rounding import Moments
from quantkit.rounding.by_layers import round_by_layers
from quantkit.rounding.in_sequence import round_biases, round_in_sequence
from quantkit.rounding.request import RoundingOptions, RoundingRequest
from quantkit.sensitivity.damage import Reference
from quantkit.simulation.model import SimulatedModel
from quantkit.simulation.playback import SimulatedProgram
from quantkit.stages.formatted import Formatted
from quantkit.stages.options import ApplyOptions
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
from quantkit.stages.recording import Recording
from quantkit.stages.reparameterize import Reparameterization, reparameterization_of
from quantkit.stages.working_memory import Expected, Learning, expected_work
from quantkit.transforms.prepare import Prepared

LOG_BITS = 4  # the width that logarithmic codes have a format for: "alog4"


def holds_probabilities(site: Site) -> bool:
    """True for a softmax that only products of activations read."""
    return site.place.op == "softmax" and not site.consumers


@dataclass(frozen=True)
class PlanApplication:
    """A float model with formats, and what was kept of it to work from."""

    formatted: Formatted
    recording: Recording | str
    reconstruction: ReconstructionPlan | None
    options: ApplyOptions
    rewritten: Reparameterization

    @property
    def ready(self) -> Prepared:
        return self.formatted.ready

    @classmethod
    def of(
        cls,
        formatted: Formatted,
        recording: Recording | str,
        reference: Reference,
        options: ApplyOptions,
        finished: Cache,
    ) -> PlanApplication:
        """Rewrites the model where that is asked for; it computes what it computed. ``reference`` are its outputs.
        What is ``finished`` is not found again. Raises InvalidRequest where learning is asked for and cannot be.
        """
        ready, batches = formatted.ready, formatted.batches
        rewritten = reparameterization_of(formatted, options, finished.artefacts)
        rewritten.rewrite(ready.weights)
        reconstruction = None
        bits = [w.bits for w in formatted.weights.values()], [a.bits for a in formatted.sites.values()]
        worth = worth_learning(*bits, batches)
        asked = {"reconstruction": options.reconstruction, "correction": options.correction}
        if any(value not in ("auto", "none") or (value == "auto" and worth) for value in asked.values()):
            planned = plan_reconstruction(ready, recording, reference.damage, options.seed, options.learning)
            reconstruction = require_reconstruction(planned, **asked)
        untouched = options.reconstruction == "auto" and not worth
        how = (
            "none"
            if untouched
            else method_to_learn(
                options.reconstruction, *bits, reconstruction is not None and reconstruction.positions
            )
        )
        return cls(formatted, recording, reconstruction, replace(options, reconstruction=how), rewritten)

    def moved_to(self, ready: Prepared) -> PlanApplication:
        """The same for another copy of the float model, which is rewritten too."""
        self.rewritten.rewrite(ready.weights)
        return replace(self, formatted=replace(self.formatted, ready=ready))

    def quantized(
        self, progress: bool, finished: Cache, known: Mapping[str, Moments]
    ) -> tuple[SimulatedModel, dict[str, Any]]:
        """The quantized model, and notes on how it was made. What is ``finished`` is not rounded or learned again;
        ``known`` are moments of layers for rounding.
        """
        ready, weights = self.ready, self.formatted.weights
        simulated = SimulatedModel(
            ready.model, ready.sites, {}, self._site_ranges(progress), ready.weights, ready.program.updated
        )
        simulated.eval()
        notes: dict[str, Any] = {}
        rounding = RoundingOptions(self.options.rounding)
        if (expected := self._announced()) is not None:
            notes["working_bytes"] = expected.memory.peak_bytes  # not the seconds, which no two runs agree on
            rounding = expected.rounding
        ratios = self.rewritten.ratios
        request = RoundingRequest(weights, rounding.name, progress, finished, rounding.hessian_bytes, ratios, known)
        notes["rounding"] = self._round(simulated, request)
        if self.rewritten.notes:
            notes["reparameterization"] = dict(self.rewritten.notes)
        learning, correcting = self.options.reconstruction, self.options.correction
        if self.reconstruction is not None and learning != "none":
            notes["reconstruction"] = reconstruct(self.reconstruction, simulated, learning, progress, finished)
        # learned by the damage, biases and scales among it, there is nothing to correct
        learned = "reconstruction" in notes and learning not in ADAQUANT and correcting == "auto"
        if self.reconstruction is not None and correcting != "none" and not learned:
            notes["correction"] = correct(self.reconstruction, simulated, correcting, progress, finished)
        simulated.bias_calls = bias_calls(ready.program, ready.sites, weights)
        round_biases(simulated, {name: ready.layers[name].inputs for name in weights})
        return simulated, notes

    def _announced(self) -> Expected | None:
        """Memory and time, said before they are taken; None where the model is not on program."""
        if isinstance(self.recording, str):
            return None
        expected = expected_work(self.formatted, self.recording, self.options, self._learning)
        notice(str(expected))
        return expected

    @property
    def _learning(self) -> Learning:
        """What will be learned."""
        found, how = self.reconstruction, self.options.reconstruction
        if found is None:
            return Learning()
        options, held = found.learning, sum(some.count for some in found.held)
        seen, few = (sum(some.seen.count for some in data) for data in (found.data, found.block_data))
        blocks = few + held if how in ("block", *ADAQUANT) else 0
        block, network = (one.on(seen) for one in found.schedules)
        schedules = {"network": (network,), "block": (block, network), "none": ()}
        return Learning(seen + held, blocks, held, schedules.get(how, (options.layer,)))

    def _site_ranges(self, progress: bool) -> dict[str, AnyRange]:
        dynamic = {name: asked for name, asked in self.formatted.sites.items() if asked.dynamic}
        ranges: dict[str, AnyRange] = {name: token_range(asked) for name, asked in dynamic.items()}
        ranges |= self.rewritten.ranges
        others = [site for site in self.ready.sites if site.name not in ranges]
        histograms = site_histograms(self.ready.model, others, self.formatted.batches, progress, self.ready.padding)
        return ranges | {site.name: self._range_of(site, histograms[site.name]) for site in others if histograms}

    def _range_of(self, site: Site, histogram: Histogram) -> SiteRange | LogRange:
        """A site's range; of probabilities the logarithmic one where the plan says so, or may and that errs less."""
        asked = self.formatted.sites[site.name]
        uniform = RANGES[self.options.ranges](histogram, asked.bits)
        if not holds_probabilities(site) or asked.bits != LOG_BITS:
            return uniform
        logarithmic = log_range(histogram, asked.bits)
        if asked.is_integer and not self.rewritten.log_probabilities:
            return uniform
        less = squared_error(histogram, logarithmic) < squared_error(histogram, uniform)
        return logarithmic if less or not asked.is_integer else uniform

    def _round(self, simulated: SimulatedModel, request: RoundingRequest) -> dict[str, str]:
        """Give every layer its codes; returns how."""
        ready, batches, program = self.ready, self.formatted.batches, self.formatted.program
        if program is None:
            return round_in_sequence(simulated, ready.program, batches, request)
        if isinstance(self.recording, Recording):
            batches = list(self.recording.samples)
        inputs = [program.entering(ready.model, batch) for batch in batches]
        return round_by_layers(SimulatedProgram(simulated, program, padding=ready.padding), inputs, request)
