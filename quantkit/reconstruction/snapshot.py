"""The part of a simulated model that rounding and learning change: held in memory, to be put back where it was better,
and on disk, so that a run that was killed repeats no piece of work that was finished.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from quantkit.formats import WeightFormat
from quantkit.numbers.kinds import AnyRange, AnyWeight, range_of, weight_of
from quantkit.numbers.packed_weight import PARTS
from quantkit.simulation.model import SimulatedModel
from quantkit.store import Arrays, Artefacts, Codec

Rounded = tuple[AnyWeight, str]  # codes, and how they were rounded
_GENERATOR = "generator"


@dataclass(frozen=True)
class Learned:
    """The loss on held-back data before and after; what was learned is put back where it did not help."""

    before: float
    after: float

    @property
    def helped(self) -> bool:
        return self.after < self.before


def arrays_of(weight: AnyWeight, name: str) -> dict[str, np.ndarray]:
    """The codes, scales and zero points of a weight, or its float16 values, as arrays named after ``name``."""
    held = weight.to_dict()
    return {f"{name} {part}": held[part].numpy() for part in PARTS if held.get(part) is not None}


def weight_of_arrays(arrays: Arrays, name: str, format: WeightFormat) -> AnyWeight:
    """The weight that ``arrays_of`` took apart."""
    held = {part: torch.from_numpy(arrays[key]) for part in PARTS if (key := f"{name} {part}") in arrays}
    return weight_of(held | {"format": str(format)})


@dataclass(frozen=True)
class Snapshot:
    """Codes, scales, biases and ranges of a model."""

    weights: Mapping[str, AnyWeight]
    biases: Mapping[str, Tensor]
    ranges: Mapping[str, AnyRange]

    @classmethod
    def of(cls, model: SimulatedModel, layers: Iterable[str] | None = None) -> Snapshot:
        """Those of ``layers`` (default: all that have codes), and every range."""
        weights = {name: model.weights[name] for name in (model.weights if layers is None else layers)}
        biases = {name: model.floats.bias(name) for name in weights}
        own = {name: bias.detach().to("cpu", copy=True) for name, bias in biases.items() if bias is not None}
        return cls(weights, own, dict(model.ranges))

    @torch.no_grad()
    def put_back(self, model: SimulatedModel) -> None:
        model.ranges.update(self.ranges)
        for name, weight in self.weights.items():
            model.set_weight(name, weight)
            bias = model.floats.bias(name)
            if bias is not None:
                bias.copy_(self.biases[name])


@dataclass(frozen=True)
class _Piece:
    """A finished piece of learning: its figures, the part of the model it changed, and where its draws ended."""

    learned: Learned
    after: Snapshot
    draws: Tensor | None


@dataclass(frozen=True)
class Cache:
    """The pieces of work on one model that are finished, by this run or by one that was killed."""

    artefacts: Artefacts = field(default_factory=Artefacts)

    def rounding(self, layer: str, format: WeightFormat, compute: Callable[[], Rounded]) -> Rounded:
        """A layer's codes and the note on how it was rounded."""
        return self.artefacts.cached(f"rounded: {layer}", str(format), compute, _rounded_codec(layer, format))

    def learned(
        self,
        piece: str,
        model: SimulatedModel,
        layers: Iterable[str],
        work: Callable[[], Learned],
        generator: torch.Generator | None = None,
    ) -> Learned:
        """What ``work()`` learns. Where it is finished, the model gets what was learned of ``layers`` and of ranges,
        and ``generator`` the state it was left in, instead.
        """
        formats = {name: model.weights[name].format for name in layers}

        def compute() -> _Piece:
            learned = work()
            return _Piece(learned, Snapshot.of(model, formats), None if generator is None else generator.get_state())

        codec = Codec(_encode, partial(_decode, formats))
        done = self.artefacts.cached(f"learned: {piece}", list(formats), compute, codec)
        done.after.put_back(model)
        if generator is not None and done.draws is not None:
            generator.set_state(done.draws)
        return done.learned


def weights_codec(formats: Mapping[str, WeightFormat]) -> Codec[tuple[dict[str, AnyWeight], str]]:
    """Named weights of these formats, with a note."""
    return Codec(
        lambda value: (_arrays_of_all(value[0]), value[1]),
        lambda arrays, note: ({name: weight_of_arrays(arrays, name, f) for name, f in formats.items()}, note),
    )


def _rounded_codec(layer: str, format: WeightFormat) -> Codec[Rounded]:
    return Codec(
        lambda value: (arrays_of(value[0], layer), value[1]),
        lambda arrays, note: (weight_of_arrays(arrays, layer, format), note),
    )


def _arrays_of_all(weights: Mapping[str, AnyWeight]) -> dict[str, np.ndarray]:
    return {key: array for name, weight in weights.items() for key, array in arrays_of(weight, name).items()}


def _encode(piece: _Piece) -> tuple[Arrays, str]:
    kept, arrays = piece.after, _arrays_of_all(piece.after.weights)
    arrays |= {f"{name} bias": bias.numpy() for name, bias in kept.biases.items()}
    if piece.draws is not None:
        arrays[_GENERATOR] = piece.draws.numpy()
    ranges = {name: found.to_dict() for name, found in kept.ranges.items()}
    return arrays, json.dumps({"learned": asdict(piece.learned), "ranges": ranges})


def _decode(formats: Mapping[str, WeightFormat], arrays: Arrays, text: str) -> _Piece:
    note = json.loads(text)
    weights = {name: weight_of_arrays(arrays, name, format) for name, format in formats.items()}
    biases = {name: torch.from_numpy(arrays[f"{name} bias"]) for name in formats if f"{name} bias" in arrays}
    ranges = {site: range_of(record) for site, record in note["ranges"].items()}
    draws = torch.from_numpy(arrays[_GENERATOR]) if _GENERATOR in arrays else None
    return _Piece(Learned(**note["learned"]), Snapshot(weights, biases, ranges), draws)
