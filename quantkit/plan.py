"""The records that travel between the stages: what was measured (Profile) and what was decided (Plan).

Both are plain data with exact save and load. A plan is JSON that a person can read, compare and edit; a profile is one
safetensors file with its JSON in the header. Neither needs torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from quantkit.errors import CorruptFile, InvalidRequest, did_you_mean
from quantkit.formats import Scheme
from quantkit.store import write_atomically

PLAN_VERSION = 1
PROFILE_VERSION = 1


def canonical_json(data: Any) -> str:
    """JSON with sorted keys and no spare spaces: equal data gives equal text, in any process."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest_of(data: Any) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of ``canonical_json(data)``."""
    return hashlib.sha256(canonical_json(data).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Layer:
    """One layer of a profiled model. ``reason`` is empty when it can be quantized, else says why it stays float.

    ``float_bytes`` is its weight as the model stores it, ``macs`` its multiply-accumulates per sample over all calls,
    ``inputs`` the sites it reads.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    float_bytes: int
    macs: int = 0
    calls: int = 1
    inputs: tuple[str, ...] = ()
    reason: str = ""

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    def weight_bytes(self, scheme: Scheme) -> int:
        """Packed bytes of this layer's weight under a scheme, scales and zero points included."""
        return self.float_bytes if scheme.weight is None else scheme.weight.storage_bytes(self.shape)


@dataclass(frozen=True)
class SiteRecord:
    """One site of a profiled model: elements per sample and the layers that read it."""

    name: str
    elements: int
    consumers: tuple[str, ...] = ()


def average_bits(layers: Mapping[str, Layer], size_bytes: int) -> float:
    """8 x packed bytes of all layers' weights / number of those weights."""
    return 8 * size_bytes / sum(layer.weights for layer in layers.values())


@dataclass(frozen=True)
class Profile:
    """What each format of each layer and site costs in damage (loss units, higher is worse), alone and in pairs.

    ``entries[k]`` is (owner, format), owner a layer (``w4``) or a site (``a8``). ``damage[k]`` is its measured damage
    alone; ``gram`` (K x K, positive semi-definite) holds the pairwise terms, scaled so that gram[k, k] = 2 damage[k]:
    the predicted damage of a plan is half the sum of ``gram`` over its entries. ``same_scheme`` lists groups of layers
    that must get one scheme. ``other_bytes`` is everything the model stores besides its layers' weights.
    """

    layers: dict[str, Layer]
    sites: dict[str, SiteRecord]
    schemes: tuple[str, ...]
    entries: tuple[tuple[str, str], ...]
    damage: np.ndarray
    gram: np.ndarray
    other_bytes: int
    float_bytes: int
    target: str
    same_scheme: tuple[tuple[str, ...], ...] = ()
    candidates: dict[str, tuple[str, ...]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def index(self) -> dict[tuple[str, str], int]:
        """Position of each (owner, format) in ``entries``."""
        return {entry: k for k, entry in enumerate(self.entries)}

    def chosen(self, schemes: Mapping[str, str | Scheme], sites: Mapping[str, str] | None = None) -> list[int]:
        """The entries a plan uses. Sites not given get their consumers' format, or the widest profiled one."""
        index, picked = self.index(), []
        parsed = {name: Scheme.parse(s) for name, s in schemes.items()}
        for name, scheme in parsed.items():
            if name not in self.layers:
                raise InvalidRequest(f"The profile has no layer {name!r}.{did_you_mean(name, list(self.layers))}")
            if scheme.weight is not None:
                picked.append(self._entry(index, name, str(scheme.weight)))
        formats = self.site_formats(parsed) if sites is None else sites
        return picked + [self._entry(index, name, fmt) for name, fmt in formats.items() if fmt != "float"]

    def _entry(self, index: Mapping[tuple[str, str], int], owner: str, fmt: str) -> int:
        try:
            return index[owner, fmt]
        except KeyError:
            known = ", ".join(f for o, f in self.entries if o == owner) or "none"
            raise InvalidRequest(f"{fmt} was not profiled for {owner!r}; profiled: {known}.") from None

    def site_formats(self, schemes: Mapping[str, Scheme]) -> dict[str, str]:
        """The format of every site that ``schemes`` implies: its consumers', else the widest profiled for it."""
        formats = {}
        for name, site in self.sites.items():
            read = [
                schemes[c].activation for c in site.consumers if c in schemes and schemes[c].activation is not None
            ]
            known = [f for owner, f in self.entries if owner == name]
            if known:
                formats[name] = str(read[0]) if read else max(known, key=_format_bits)
        return formats

    def predict(self, schemes: Mapping[str, str | Scheme], sites: Mapping[str, str] | None = None) -> float:
        """Predicted damage of a mapping layer name -> scheme (pair terms included)."""
        chosen = self.chosen(schemes, sites)
        return 0.5 * float(self.gram[np.ix_(chosen, chosen)].sum())

    def predict_separable(self, schemes: Mapping[str, str | Scheme], sites: Mapping[str, str] | None = None) -> float:
        """The same without pair terms: the sum of the damages measured alone."""
        return float(self.damage[self.chosen(schemes, sites)].sum())

    def digest(self) -> str:
        arrays = hashlib.sha256(self.damage.tobytes() + self.gram.tobytes()).hexdigest()
        return digest_of([self._header(), arrays])

    def _header(self) -> dict[str, Any]:
        header = {k: v for k, v in asdict(self).items() if k not in ("damage", "gram")}
        return header | {"version": PROFILE_VERSION}

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file: the arrays, and everything else as JSON in its header."""
        arrays = {"damage": self.damage, "gram": self.gram}
        metadata = {"quantkit_profile": canonical_json(self._header())}
        return write_atomically(path, lambda temporary: save_file(arrays, temporary, metadata=metadata))

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a profile; raises CorruptFile when the file is damaged or is none."""
        try:
            with safe_open(str(path), framework="numpy") as file:
                header = json.loads((file.metadata() or {})["quantkit_profile"])
                arrays = {"damage": file.get_tensor("damage"), "gram": file.get_tensor("gram")}
            if header.pop("version") != PROFILE_VERSION:
                raise KeyError("version")
            header["layers"] = {n: Layer(**_tuples(v)) for n, v in header["layers"].items()}
            header["sites"] = {n: SiteRecord(**_tuples(v)) for n, v in header["sites"].items()}
            header["entries"] = tuple((owner, fmt) for owner, fmt in header["entries"])
            header["same_scheme"] = tuple(tuple(g) for g in header["same_scheme"])
            header["candidates"] = {n: tuple(v) for n, v in header["candidates"].items()}
            header["schemes"] = tuple(header["schemes"])
            return cls(**header, **arrays)
        except OSError as error:
            raise InvalidRequest(f"Cannot read the profile {str(path)!r}: {error.strerror or error}.") from error
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CorruptFile(
                f"{str(path)!r} is not a complete quantkit profile ({error}). Run `quantkit profile` again."
            ) from error


def _tuples(record: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}


def _format_bits(fmt: str) -> int:
    activation = Scheme.parse(fmt).activation
    return activation.bits if activation else 0


@dataclass(frozen=True)
class Plan:
    """The decision: a scheme per layer, a format per site, and how it came about.

    ``size_bytes`` are the packed bytes of all layers' weights; ``total_bytes`` adds everything else the model stores.
    ``why`` gives a sentence per layer. ``provenance`` records budget, solver, optimality gap, seed, target and
    digests.
    """

    schemes: dict[str, Scheme]
    sites: dict[str, str] = field(default_factory=dict)
    size_bytes: int = 0
    total_bytes: int = 0
    average_bits: float = 0.0
    predicted_damage: float | None = None
    why: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        data = {"version": PLAN_VERSION} | {k: getattr(self, k) for k in self.__dataclass_fields__}
        return data | {"schemes": {name: str(scheme) for name, scheme in self.schemes.items()}}

    def digest(self) -> str:
        """Identifies the decision itself: schemes and sites, not how they came about."""
        data = self.to_dict()
        return digest_of([data["schemes"], data["sites"]])

    def save(self, path: str | Path) -> Path:
        """Write JSON; the same plan gives the same bytes."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        return write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan, hand-edited or not. Raises CorruptFile for broken JSON and InvalidRequest for unknown schemes
        or keys.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InvalidRequest(f"Cannot read the plan {str(path)!r}: {error.strerror or error}.") from error
        except ValueError as error:
            raise CorruptFile(
                f"{str(path)!r} is not valid JSON ({error}): the plan is damaged or was cut off."
            ) from error
        if not isinstance(data, dict) or not isinstance(data.get("schemes"), dict):
            raise CorruptFile(
                f"{str(path)!r} is not a quantkit plan: it has no table 'schemes' (layer name -> scheme)."
            )
        if data.pop("version", None) != PLAN_VERSION:
            raise CorruptFile(f"{str(path)!r} is not a plan of version {PLAN_VERSION}; allocate again.")
        known = set(cls.__dataclass_fields__)
        for key in data.keys() - known:
            raise InvalidRequest(f"Unknown key {key!r} in the plan {str(path)!r}.{did_you_mean(key, sorted(known))}")
        return replace(cls({}), **data | {"schemes": {n: Scheme.parse(s) for n, s in data["schemes"].items()}})

    @classmethod
    def of(cls, schemes: Plan | Mapping[str, str | Scheme]) -> Plan:
        """A plan from itself or from a plain mapping layer name -> scheme."""
        return schemes if isinstance(schemes, Plan) else cls({n: Scheme.parse(s) for n, s in schemes.items()})

    def __str__(self) -> str:
        width = max([len(n) for n in self.schemes], default=5)
        head = f"{self.size_bytes:,} bytes of weights, {self.average_bits:.3f} bits on average"
        rows = [f"{n:<{width}}  {s!s:<8}  {self.why.get(n, '')}".rstrip() for n, s in self.schemes.items()]
        return "\n".join([head, *rows])
