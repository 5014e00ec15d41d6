"""Profile: what was measured, saved as one safetensors file with its JSON in the header. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from quantkit.errors import CorruptFile, InvalidRequest, did_you_mean
from quantkit.formats import Scheme
from quantkit.plan.digest import digest_of
from quantkit.plan.latency import LatencyTable
from quantkit.plan.operations import Operation
from quantkit.plan.records import Layer, SiteRecord
from quantkit.plan.validation import check_types, frozen_lists, record_of
from quantkit.store import write_atomically

PROFILE_VERSION = 2


def saturated(quadratic: Any, saturation: Any, growth: Any = 0.0) -> Any:
    """h / (1 + s h) of h = q (1 + g q): damage grows faster than its quadratic form q first, and stops before 1 / s;
    0 and 0 leave it as it is. The order of plans stays.
    """
    grown = quadratic * (1 + growth * quadratic)
    return grown / (1 + saturation * grown)


@dataclass(frozen=True)
class Profile:
    """What each format of each layer and site costs in damage (loss units, higher is worse), alone and in pairs.

    ``entries[k]`` is (owner, format), owner a layer (``w4``) or a site (``a8``). ``damage[k]`` is its measured damage
    alone; ``gram`` (K x K, positive semi-definite) holds the pairwise terms, scaled so that gram[k, k] = 2 damage[k]:
    half the sum of ``gram`` over a plan's entries, ``saturated``, is its predicted damage. ``same_scheme`` lists
    groups of layers that must get one scheme. ``other_bytes`` is everything the model stores besides its layers'
    weights, ``float_bytes`` all that the user's model stores, ``float32_bytes`` the same at 4 bytes for each
    floating-point number (0: not known). ``operations`` say which sites are made and read where; ``latency`` what that
    takes on the target, where it was measured.
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
    saturation: float = 0.0
    growth: float = 0.0
    operations: tuple[Operation, ...] = ()
    latency: LatencyTable | None = None
    float32_bytes: int = 0

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
                picked.append(self.entry(index, name, str(scheme.weight)))
        formats = self.site_formats(parsed) if sites is None else sites
        return picked + [self.entry(index, name, fmt) for name, fmt in formats.items() if fmt != "float"]

    def entry(self, index: Mapping[tuple[str, str], int], owner: str, fmt: str) -> int:
        """The position of an entry; raises InvalidRequest, with what was profiled, where there is none."""
        try:
            return index[owner, fmt]
        except KeyError:
            known = ", ".join(self._profiled(owner, fmt[0])) or "none"
            raise InvalidRequest(f"{fmt} was not profiled for {owner!r}; profiled: {known}.") from None

    def _profiled(self, owner: str, kind: str) -> list[str]:
        """The weight ("w") or activation ("a") formats measured for an owner: a site may be named as its layer is."""
        return [fmt for name, fmt in self.entries if name == owner and fmt[0] == kind]

    def site_formats(self, schemes: Mapping[str, Scheme]) -> dict[str, str]:
        """The format of every site that ``schemes`` implies: its consumers', else the widest profiled for it."""
        formats = {}
        for name, site in self.sites.items():
            read = [
                schemes[c].activation for c in site.consumers if c in schemes and schemes[c].activation is not None
            ]
            known = self._profiled(name, "a")
            if known:
                formats[name] = str(read[0]) if read else max(known, key=_format_bits)
        return formats

    def predict(self, schemes: Mapping[str, str | Scheme], sites: Mapping[str, str] | None = None) -> float:
        """Predicted damage of a mapping layer name -> scheme (pair terms included)."""
        chosen = self.chosen(schemes, sites)
        return float(saturated(0.5 * float(self.gram[np.ix_(chosen, chosen)].sum()), self.saturation, self.growth))

    def digest(self) -> str:
        arrays = hashlib.sha256(self.damage.tobytes() + self.gram.tobytes()).hexdigest()
        return digest_of([self._header(), arrays])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Profile) and self.digest() == other.digest()

    def _header(self) -> dict[str, Any]:
        header = {k: v for k, v in asdict(self).items() if k not in ("damage", "gram")}
        return header | {"version": PROFILE_VERSION}

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file: the arrays, and everything else as JSON in its header."""
        # safetensors writes the memory of an array, whatever its strides say
        arrays = {"damage": np.ascontiguousarray(self.damage), "gram": np.ascontiguousarray(self.gram)}
        # not sorted: layers stay in execution order, which is that of a plan's reasons
        metadata = {"quantkit_profile": json.dumps(self._header(), separators=(",", ":"), allow_nan=False)}
        return write_atomically(path, lambda temporary: save_file(arrays, temporary, metadata=metadata))

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a profile; raises CorruptFile when the file is damaged or is none."""
        try:
            with safe_open(str(path), framework="numpy") as file:
                header = json.loads((file.metadata() or {})["quantkit_profile"])
                arrays = {"damage": file.get_tensor("damage"), "gram": file.get_tensor("gram")}
            return cls._from_header(header, arrays)
        except OSError as error:
            raise InvalidRequest(f"Cannot read the profile {str(path)!r}: {error.strerror or error}.") from error
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            found = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise CorruptFile(
                f"{str(path)!r} is not a complete quantkit profile ({found}). Run `quantkit profile` again."
            ) from error

    @classmethod
    def _from_header(cls, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> Profile:
        """The profile of what a file holds; raises whatever a wrong type or shape leads to."""
        version = header.pop("version")
        if type(version) is not int or version != PROFILE_VERSION:
            raise ValueError(f"version {version!r}, this quantkit reads {PROFILE_VERSION}")
        values = arrays | frozen_lists(header)
        if missing := sorted(cls.__dataclass_fields__.keys() - values.keys()):
            raise KeyError(*missing)
        values["layers"] = {n: record_of(Layer, v) for n, v in header["layers"].items()}
        values["sites"] = {n: record_of(SiteRecord, v) for n, v in header["sites"].items()}
        values["operations"] = tuple(record_of(Operation, v) for v in header["operations"])
        values["latency"] = None if header["latency"] is None else LatencyTable.from_dict(header["latency"])
        values["candidates"] = frozen_lists(header["candidates"])
        values["provenance"] = header["provenance"]
        check_types(cls, values)
        count = len(values["entries"])
        if arrays["damage"].shape != (count,) or arrays["gram"].shape != (count, count):
            shapes = f"{arrays['damage'].shape} and {arrays['gram'].shape}"
            raise ValueError(f"damage and gram of shapes {shapes} for {count} entries")
        return cls(**values)


def _format_bits(fmt: str) -> int:
    activation = Scheme.parse(fmt).activation
    return activation.bits if activation else 0
