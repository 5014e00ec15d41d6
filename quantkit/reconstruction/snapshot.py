"""The part of a simulated model that rounding and learning change: held in memory, to be put back where it was better,
and on disk, so that a run that was killed repeats no piece of work that was finished.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import Tensor

from quantkit.formats import WeightFormat
from quantkit.numbers.kinds import AnyRange, range_of
from quantkit.numbers.uniform import QuantizedWeight
from quantkit.program.layers import bias_of
from quantkit.reconstruction.learning import Learned
from quantkit.simulation.model import SimulatedModel
from quantkit.store import Artefacts

Arrays = Mapping[str, np.ndarray]
_GENERATOR = "generator"
_PARTS = ("codes", "scale", "zero_point")


def arrays_of(weight: QuantizedWeight, name: str) -> dict[str, np.ndarray]:
    """The codes, scales and zero points of a weight as arrays named after ``name``."""
    held = weight.to_dict()
    return {f"{name} {part}": held[part].numpy() for part in _PARTS if held[part] is not None}


def weight_of_arrays(arrays: Arrays, name: str, format: WeightFormat) -> QuantizedWeight:
    """The weight that ``arrays_of`` took apart."""
    held = {part: torch.from_numpy(arrays[key]) for part in _PARTS if (key := f"{name} {part}") in arrays}
    return QuantizedWeight.from_dict(held | {"format": str(format)})


@dataclass(frozen=True)
class Snapshot:
    """Codes, scales, biases and ranges of a model."""

    weights: Mapping[str, QuantizedWeight]
    biases: Mapping[str, Tensor]
    ranges: Mapping[str, AnyRange]

    @classmethod
    def of(cls, model: SimulatedModel, layers: Iterable[str] | None = None) -> Snapshot:
        """Those of ``layers`` (default: all that have codes), and every range."""
        weights = {name: model.weights[name] for name in (model.weights if layers is None else layers)}
        biases = {name: bias_of(model.model, name) for name in weights}
        own = {name: bias.detach().clone() for name, bias in biases.items() if bias is not None}
        return cls(weights, own, dict(model.ranges))

    @torch.no_grad()
    def put_back(self, model: SimulatedModel) -> None:
        model.ranges.update(self.ranges)
        for name, weight in self.weights.items():
            model.set_weight(name, weight)
            bias = bias_of(model.model, name)
            if bias is not None:
                bias.copy_(self.biases[name])


@dataclass(frozen=True)
class Cache:
    """The pieces of work on one model that are finished, by this run or by one that was killed."""

    artefacts: Artefacts = field(default_factory=Artefacts)

    def rounded(self, layer: str, format: WeightFormat) -> tuple[QuantizedWeight, str] | None:
        """A layer's codes and the note on how it was rounded; None where that is still to be done."""
        kept = self.artefacts.find(f"rounded: {layer}", str(format))
        return None if kept is None else (weight_of_arrays(kept[0], layer, format), kept[1])

    def keep_rounded(self, layer: str, weight: QuantizedWeight, note: str) -> None:
        self.artefacts.keep(f"rounded: {layer}", str(weight.format), arrays_of(weight, layer), note)

    def learned(
        self,
        piece: str,
        model: SimulatedModel,
        layers: Iterable[str],
        work: Callable[[], Learned],
        generator: torch.Generator | None = None,
    ) -> Learned:
        """What ``work()`` finds. Where it is finished, the model gets what was learned of ``layers`` and of ranges,
        and ``generator`` the state it was left in, instead.
        """
        names = list(layers)
        kept = self.artefacts.find(f"learned: {piece}", names)
        if kept is None:
            found = work()
            self._keep(piece, Snapshot.of(model, names), found, generator)
            return found
        arrays, note = kept[0], json.loads(kept[1])
        weights = {name: weight_of_arrays(arrays, name, model.weights[name].format) for name in names}
        biases = {name: torch.from_numpy(arrays[f"{name} bias"]) for name in names if f"{name} bias" in arrays}
        ranges = {site: range_of(record) for site, record in note["ranges"].items()}
        Snapshot(weights, biases, ranges).put_back(model)
        if generator is not None:
            generator.set_state(torch.from_numpy(arrays[_GENERATOR]))
        return Learned(**note["learned"])

    def _keep(self, piece: str, kept: Snapshot, learned: Learned, generator: torch.Generator | None) -> None:
        arrays: dict[str, np.ndarray] = {}
        for name, weight in kept.weights.items():
            arrays |= arrays_of(weight, name)
        arrays |= {f"{name} bias": bias.numpy() for name, bias in kept.biases.items()}
        if generator is not None:
            arrays[_GENERATOR] = generator.get_state().numpy()
        ranges = {name: found.to_dict() for name, found in kept.ranges.items()}
        note = json.dumps({"learned": asdict(learned), "ranges": ranges})
        self.artefacts.keep(f"learned: {piece}", list(kept.weights), arrays, note)
