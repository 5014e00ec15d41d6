"""Layers and sites as a profile records them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from quantkit.formats import Scheme
from quantkit.plan.digest import digest_of

FLOAT = "float"  # the format of a site that holds no codes


@dataclass(frozen=True)
class Layer:
    """One layer of a profiled model. ``reason`` is empty when it can be quantized, else says why it stays float.

    ``float_bytes`` is its weight as the model stores it, or in float16 where what stays float is that, ``macs`` its
    multiply-accumulates per sample over all calls, ``inputs`` the sites it reads. ``weight_only``: what it reads has
    no codes, whatever its scheme. ``unread``: no call reads its weight, as that of a head which only training uses; a
    file does not hold it, no size counts it.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    float_bytes: int
    macs: int = 0
    calls: int = 1
    inputs: tuple[str, ...] = ()
    reason: str = ""
    weight_only: bool = False
    unread: bool = False

    @property
    def weights(self) -> int:
        """How many numbers a file stores for it before they are quantized."""
        return 0 if self.unread else math.prod(self.shape)

    def carried_out(self, scheme: Scheme) -> Scheme:
        """What becomes of a scheme here: its weight format alone where the layer's inputs have no codes."""
        return scheme.with_activation(None) if self.weight_only else scheme

    def weight_bytes(self, scheme: Scheme) -> int:
        """Packed bytes of this layer's weight under a scheme, scales and zero points included."""
        return self.float_bytes if scheme.weight is None else scheme.weight.storage_bytes(self.shape)


@dataclass(frozen=True)
class SiteRecord:
    """One site of a profiled model: elements per sample and the layers that read it."""

    name: str
    elements: int
    consumers: tuple[str, ...] = ()


def digest_shapes(layers: Mapping[str, Layer]) -> str:
    """Identifies a model's layers, in any order, with their shapes and the size of what they are called on."""
    return digest_of(sorted([layer.name, list(layer.shape), layer.macs] for layer in layers.values()))


def average_bits(layers: Mapping[str, Layer], size_bytes: int) -> float:
    """8 x packed bytes of all layers' weights / number of those weights."""
    return 8 * size_bytes / sum(layer.weights for layer in layers.values())
