"""Plan: what was decided, as JSON that a person can read, compare and edit. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.errors import CorruptFile, InvalidRequest, did_you_mean
from quantkit.formats import Scheme
from quantkit.plan.digest import digest_of
from quantkit.plan.validation import check_types, refuse_constant
from quantkit.store import write_atomically

PLAN_VERSION = 1
FLOAT_STORAGE = "float_storage"  # what of it says as what is stored that stays float, where that is not float32
LARGEST_OTHERS = "largest_others"  # and of a profile's: what it stores besides layers' weights, by name, in bytes
TRANSFORMS = "transforms"  # what of a plan's provenance says how the float model was changed
COMPOSITION = "bytes"  # what of a plan's provenance says what its bytes consist of


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
            data = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse_constant)
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
            check_types(cls, values)
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
        head += f"\n{self.provenance[COMPOSITION]}" if COMPOSITION in self.provenance else ""
        rows = [f"{n:<{width}}  {s!s:<8}  {self.why.get(n, '')}".rstrip() for n, s in self.schemes.items()]
        return "\n".join([head, *rows])


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
