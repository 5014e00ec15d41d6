"""What a model's bytes consist of under a plan: quantized, float for which reason, and the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantkit.formats import Scheme
from quantkit.plan.records import Layer

LEFT = "left float by the plan"
SHOWN = 3  # reasons, and layers of each


@dataclass(frozen=True)
class SizePart:
    """What is as large as it is for one ``reason``: names, those with most bytes first, and the bytes of all."""

    reason: str
    names: tuple[str, ...]
    bytes: int

    def __str__(self) -> str:
        more = f" and {len(self.names) - SHOWN} more" if len(self.names) > SHOWN else ""
        return f"{', '.join(self.names[:SHOWN])}{more} ({self.bytes:,} bytes): {self.reason}"


@dataclass(frozen=True)
class Composition:
    """Bytes of the user's model, and under a plan those of the layers with codes, of the float ones, by reason, the
    largest first, of everything else (biases, norms, what codes bring with them) and of the layers in float16.
    """

    model: int
    quantized: int
    floats: tuple[SizePart, ...]
    other: int
    halves: int = 0

    @classmethod
    def of(cls, layers: Mapping[str, Layer], schemes: Mapping[str, Scheme], other: int, model: int) -> Composition:
        """That of layers under ``schemes`` (float where there is none), with ``other`` bytes besides weights, of a
        ``model`` of so many bytes."""
        chosen = {name: schemes.get(name, Scheme()) for name in layers}
        weights = [(scheme, layers[name].weight_bytes(scheme)) for name, scheme in chosen.items()]
        quantized = sum(size for scheme, size in weights if scheme.has_codes)
        halves = sum(size for scheme, size in weights if not (scheme.has_codes or scheme.is_float))
        groups: dict[str, list[Layer]] = {}
        for name, layer in layers.items():
            if chosen[name].is_float and not layer.unread:
                groups.setdefault(layer.reason or LEFT, []).append(layer)
        floats = [_float_layers(reason, found) for reason, found in groups.items()]
        return cls(model, quantized, tuple(sorted(floats, key=lambda one: -one.bytes)), other, halves)

    @property
    def float_bytes(self) -> int:
        return sum(one.bytes for one in self.floats)

    @property
    def total(self) -> int:
        return self.quantized + self.halves + self.float_bytes + self.other

    def why_float(self) -> str:
        """The layers that stay float with their reasons, the largest first; empty where there are none."""
        rest = self.floats[SHOWN:]
        more = [f"{len(rest)} more reasons ({sum(one.bytes for one in rest):,} bytes)"] if rest else []
        return "; ".join([str(one) for one in self.floats[:SHOWN]] + more)

    def __str__(self) -> str:
        floats = f"; {self.float_bytes:,} float: {self.why_float()}" if self.floats else ""
        halves = f"{self.halves:,} weights in float16, " if self.halves else ""
        return (
            f"model {self.model:,} bytes -> {self.total:,} bytes: {self.quantized:,} quantized weights, "
            f"{halves}{self.other:,} biases, norms, scales and other tensors{floats}"
        )


def _float_layers(reason: str, layers: Sequence[Layer]) -> SizePart:
    ordered = sorted(layers, key=lambda layer: -layer.float_bytes)
    return SizePart(reason, tuple(layer.name for layer in ordered), sum(layer.float_bytes for layer in layers))
