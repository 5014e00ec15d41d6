"""Profiles of networks that do not exist: layers of random sizes, shared sites, groups, layers that stay float."""

from __future__ import annotations

import numpy as np

from quantkit.formats import Scheme
from quantkit.plan import Layer, Profile, SiteRecord

SCHEMES = ("w2a4", "w2a8", "w4a4", "w4a8", "w8a8", "w8g8a8")


def network(
    seed: int,
    layers: int = 5,
    schemes: tuple[str, ...] = SCHEMES,
    pairs: bool = False,
    tied: bool = True,
    kept_float: bool = True,
) -> Profile:
    """A chain of layers, each reading its own site, but the second and the third the same one.

    ``tied``: the last two layers take one scheme. ``kept_float``: another layer has a reason to stay float."""
    draw = np.random.default_rng(seed)
    names = [f"layer{i}" for i in range(layers)]
    reads = [f"site{0 if i == 0 else max(1, i - 1)}" for i in range(layers)]
    records = {
        name: _layer(name, (8, 8 * int(draw.integers(1, 6)), 3, 3), site)
        for name, site in zip(names, reads, strict=True)
    }
    if kept_float:
        records["head"] = _layer("head", (10, 8), "input", reason="its inputs were never seen")
    parsed = [Scheme.parse(scheme) for scheme in schemes]
    weights = list(dict.fromkeys(str(s.weight) for s in parsed))
    activations = list(dict.fromkeys(str(s.activation) for s in parsed if s.activation))
    entries = [(name, fmt) for name in names for fmt in weights]
    entries += [(site, fmt) for site in dict.fromkeys(reads) for fmt in activations]
    gram = _gram(draw, [Scheme.parse(fmt) for _, fmt in entries])
    return Profile(
        layers=records,
        sites={s: SiteRecord(s, 64, tuple(n for n, r in zip(names, reads, strict=True) if r == s)) for s in reads},
        schemes=schemes,
        entries=tuple(entries),
        damage=np.diag(gram) / 2,
        gram=gram if pairs else np.diag(np.diag(gram)),
        other_bytes=1000,
        float_bytes=1000 + sum(layer.float_bytes for layer in records.values()),
        target="onnxruntime-cpu",
        same_scheme=(tuple(names[-2:]),) if tied else (),
    )


def _layer(name: str, shape: tuple[int, ...], site: str, reason: str = "") -> Layer:
    weights = int(np.prod(shape))
    return Layer(name, "conv2d", shape, 4 * weights, macs=weights * 49, inputs=(site,), reason=reason)


def _gram(draw: np.random.Generator, formats: list[Scheme]) -> np.ndarray:
    """Of random shifts, half as long with every bit, with something in common."""
    bits = np.array([(scheme.weight or scheme.activation).bits for scheme in formats])  # type: ignore[union-attr]
    shifts = draw.normal(size=(len(formats), 24)) + draw.normal(size=24)
    shifts *= (2.0**-bits * draw.uniform(0.5, 2, len(formats)))[:, None]
    gram: np.ndarray = shifts @ shifts.T
    return gram
