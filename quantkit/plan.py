"""The records that travel between the stages: what was measured (Profile) and what was decided (Plan).

Both are plain data with exact save and load. A plan is JSON that a person can read, compare and edit; a profile is one
safetensors file with its JSON in the header. Neither needs torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from quantkit.errors import CorruptFile, InvalidRequest, did_you_mean
from quantkit.formats import Scheme
from quantkit.latency import LatencyTable
from quantkit.operations import Operation
from quantkit.store import write_atomically

FLOAT = "float"  # the format of a site that holds no codes
PLAN_VERSION = 1
PROFILE_VERSION = 2


def canonical_json(data: Any) -> str:
    """JSON with sorted keys and no spare spaces: equal data gives equal text, in any process."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest_of(data: Any) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of ``canonical_json(data)``."""
    return hashlib.sha256(canonical_json(data).encode()).hexdigest()[:16]


def _check_types(record: type, values: Mapping[str, Any]) -> None:
    """Raise TypeError for the first value that is not what the record's field of that name holds: files get edited."""
    hints = get_type_hints(record)
    for name, value in values.items():
        if name in hints and not _fits(value, hints[name]):
            raise TypeError(f"{name} is {value!r:.60}, expected {record.__annotations__[name]}")


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is UnionType:
        return any(_fits(value, option) for option in inner)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if origin is tuple:
        each = inner[:1] * len(value) if inner[-1] is Ellipsis and isinstance(value, tuple) else inner
        return isinstance(value, tuple) and len(value) == len(each) and all(map(_fits, value, each))
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool) and abs(value) < math.inf
    return isinstance(value, hint)


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


def digest_shapes(layers: Mapping[str, Layer]) -> str:
    """Identifies a model's layers, in any order, with their shapes and the size of what they are called on."""
    return digest_of(sorted([layer.name, list(layer.shape), layer.macs] for layer in layers.values()))


def average_bits(layers: Mapping[str, Layer], size_bytes: int) -> float:
    """8 x packed bytes of all layers' weights / number of those weights."""
    return 8 * size_bytes / sum(layer.weights for layer in layers.values())


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
                picked.append(self._entry(index, name, str(scheme.weight)))
        formats = self.site_formats(parsed) if sites is None else sites
        return picked + [self._entry(index, name, fmt) for name, fmt in formats.items() if fmt != "float"]

    def _entry(self, index: Mapping[tuple[str, str], int], owner: str, fmt: str) -> int:
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

    def predict_separable(self, schemes: Mapping[str, str | Scheme], sites: Mapping[str, str] | None = None) -> float:
        """The same without pair terms: the sum of the damages measured alone."""
        return float(self.damage[self.chosen(schemes, sites)].sum())

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
        values = arrays | _tuples(header)
        if missing := sorted(cls.__dataclass_fields__.keys() - values.keys()):
            raise KeyError(*missing)
        values["layers"] = {n: _record(Layer, v) for n, v in header["layers"].items()}
        values["sites"] = {n: _record(SiteRecord, v) for n, v in header["sites"].items()}
        values["operations"] = tuple(_record(Operation, v) for v in header["operations"])
        values["latency"] = None if header["latency"] is None else LatencyTable.from_dict(header["latency"])
        values["candidates"] = _tuples(header["candidates"])
        values["provenance"] = header["provenance"]
        _check_types(cls, values)
        count = len(values["entries"])
        if arrays["damage"].shape != (count,) or arrays["gram"].shape != (count, count):
            shapes = f"{arrays['damage'].shape} and {arrays['gram'].shape}"
            raise ValueError(f"damage and gram of shapes {shapes} for {count} entries")
        return cls(**values)


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's lists, and lists in them, as the tuples the records hold."""

    def frozen(value: Any) -> Any:
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    return {key: frozen(value) for key, value in data.items()}


def _record(kind: type, data: Mapping[str, Any]) -> Any:
    values = _tuples(data)
    _check_types(kind, values)
    return kind(**values)


def _format_bits(fmt: str) -> int:
    activation = Scheme.parse(fmt).activation
    return activation.bits if activation else 0


def _parsed(schemes: Mapping[str, str | Scheme]) -> dict[str, Scheme]:
    """The scheme of each name; raises InvalidRequest with the name whose scheme cannot be read."""
    parsed = {}
    for name, scheme in schemes.items():
        try:
            parsed[name] = Scheme.parse(scheme)
        except InvalidRequest as error:
            raise InvalidRequest(f"{name!r}: {error}") from error
    return parsed


def _site_formats(sites: Mapping[str, str]) -> dict[str, str]:
    parsed = _parsed(sites)
    for name, scheme in parsed.items():
        if scheme.weight is not None:
            raise InvalidRequest(f"site {name!r} is given {scheme}; a site has no weight: 'a8', say, or 'float'.")
    return {name: str(scheme) for name, scheme in parsed.items()}


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number in JSON")


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
        """Read a plan, hand-edited or not. Raises CorruptFile for broken JSON and InvalidRequest for unknown schemes,
        unknown keys and values of the wrong type.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        except OSError as error:
            raise InvalidRequest(f"Cannot read the plan {str(path)!r}: {error.strerror or error}.") from error
        except (ValueError, RecursionError) as error:
            raise CorruptFile(
                f"{str(path)!r} is not valid JSON ({error}): the plan is damaged or was cut off."
            ) from error
        if not isinstance(data, dict) or not isinstance(data.get("schemes"), dict):
            raise CorruptFile(
                f"{str(path)!r} is not a quantkit plan: it has no table 'schemes' (layer name -> scheme)."
            )
        version = data.pop("version", None)
        if type(version) is not int or version != PLAN_VERSION:
            raise CorruptFile(f"{str(path)!r} is not a plan of version {PLAN_VERSION}; allocate again.")
        known = set(cls.__dataclass_fields__)
        for key in sorted(data.keys() - known):
            raise InvalidRequest(f"Unknown key {key!r} in the plan {str(path)!r}.{did_you_mean(key, sorted(known))}")
        try:
            values = data | {"schemes": _parsed(data["schemes"])}
            _check_types(cls, values)
            return cls(**values | {"sites": _site_formats(values.get("sites", {}))})
        except (InvalidRequest, TypeError) as error:
            raise InvalidRequest(f"In the plan {str(path)!r}: {str(error).rstrip('.')}.") from error

    @classmethod
    def of(cls, schemes: Plan | Mapping[str, str | Scheme]) -> Plan:
        """A plan from itself or from a plain mapping layer name -> scheme."""
        if isinstance(schemes, Plan):
            return schemes
        if not isinstance(schemes, Mapping):
            raise InvalidRequest(f"A plan is a Plan or a mapping layer name -> scheme, not {schemes!r}.")
        return cls(_parsed(schemes))

    def __str__(self) -> str:
        width = max([len(n) for n in self.schemes], default=5)
        head = f"{self.size_bytes:,} bytes of weights, {self.average_bits:.3f} bits on average"
        rows = [f"{n:<{width}}  {s!s:<8}  {self.why.get(n, '')}".rstrip() for n, s in self.schemes.items()]
        return "\n".join([head, *rows])
