"""Budgets: any number of limits a plan must meet, or a scheme for everything, read from what users write.

    "4 bits"    "300 KB"    "25%"    "4 bits, 300 KB"    "latency=60%, size=1 MiB"    {"size": "300 KB",
"average_bits": 4}    "w8a8"

A bare amount says by its unit what it limits: bits the average bits, bytes or a percentage the size. Everything else
is written ``name=amount``. Percentages of size and bit-operations are relative to the model in float32. A scheme
leaves nothing to decide: every layer that can gets it, and limits beside it are only checked."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from decimal import Decimal
from fractions import Fraction

from quantkit.errors import InvalidRequest, did_you_mean
from quantkit.formats import Scheme
from quantkit.plan import Profile

FLOAT_BITS = 32
_BYTES = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_COUNTS = {"": 1, "bops": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_NANOSECONDS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9}
_PERCENT = {"%": 1}
_BITS = {"bits": 1}
_PLAIN = {"": 1}

Units = Mapping[str, int]
# What each limit is written in: unit -> factor to bytes, bits, bit-operations, nanoseconds; percentages stay apart.
UNITS: dict[str, Units] = {
    "size": _BYTES | _PERCENT,
    "average_bits": _BITS,
    "bops": _COUNTS | _PERCENT,
    "latency": _NANOSECONDS | _PERCENT,
    "activation_bytes": _BYTES,
    "accuracy_drop": _PLAIN | _PERCENT,
    "file_size": _BYTES,
}
LIMITS = tuple(UNITS)
MINIMIZABLE = ("size", "average_bits", "bops", "latency", "activation_bytes")
_UNIT_OF_NUMBER = {
    "size": "B",
    "average_bits": "bits",
    "bops": "",
    "activation_bytes": "B",
    "accuracy_drop": "",
    "file_size": "B",
}
_COUNTED_IN = {"size": "B", "bops": "bops", "latency": "ns", "activation_bytes": "B"}
_OTHER_SPELLINGS = {"bit": "bits", "byte": "B", "bytes": "B", "percent": "%", "µs": "us", "μs": "us"}
_LARGEST_EXPONENT = 30  # exact arithmetic on an amount such as 1e999999999 would not end
_AMOUNT = re.compile(
    r"(?P<number>[+-]?(?:\d[\d_]*\.?\d*(?:e[+-]?\d+)?|\.\d+|nan|inf(?:inity)?))[\s-]*(?P<unit>[^\s\d]*)", re.I
)
_LIKE_A_SCHEME = re.compile(r"[wa]-?(\d|fp|nv|mx|log)", re.I)
_LONGEST = 80  # characters of what is shown of a wrong budget: a tensor has pages
_UNDERSTOOD = (
    "Understood: '4 bits', '300 KB' (B, KB, MB, GB, KiB, MiB, GiB), '25%' (of the float32 size), "
    "'bops=50%' or 'bops=12 G', 'latency=60%' or 'latency=3 ms', 'activation_bytes=64 KB', 'accuracy_drop=0.5' or "
    "'accuracy_drop=1%', 'minimize=size', 'confident=true'; several at once separated by commas; or a scheme for "
    "every layer that can take it, such as 'w8a8'."
)
BESIDE_A_SCHEME = ("size", "average_bits", "bops", "accuracy_drop", "file_size")


@dataclass(frozen=True)
class Budget:
    """Limits that hold together, or a scheme; at least one. Amounts are kept as canonical text ("300 KB"), bits as a
    number.

    ``size``: all tensors the model stores; ``file_size``: the ONNX file, graph included, which has to be written to
    know it. ``average_bits``: packed bits of the layers' weights per weight. ``bops``:
    sum of weight bits x activation bits x multiply-accumulates. ``latency``: per batch of the target's latency table,
    or relative to the float model there. ``activation_bytes``: peak of live sites, for one sample. ``accuracy_drop``:
    in the units of ``evaluate``, or relative. ``minimize`` names what to make small when accuracy is the limit; with
    ``confident`` the drop's one-sided 95 % confidence bound must meet it, which needs an ``evaluate`` that returns a
    number for each sample. ``scheme``: what every layer that can gets ("w8a8"), so that nothing has to be looked for.
    Raises InvalidRequest for an amount that cannot be read or is not positive."""

    size: str | int | float | None = None
    average_bits: str | int | float | None = None
    bops: str | int | float | None = None
    latency: str | int | float | None = None
    activation_bytes: str | int | float | None = None
    accuracy_drop: str | int | float | None = None
    minimize: str | None = None
    confident: bool | str = False
    file_size: str | int | float | None = None
    scheme: str | Scheme | None = None

    def __post_init__(self) -> None:
        for name in LIMITS:
            if (asked := getattr(self, name)) is not None:
                object.__setattr__(self, name, _canonical(name, *_read(name, asked)))
        if self.minimize is not None and self.minimize not in MINIMIZABLE:
            raise InvalidRequest(
                f"minimize={self.minimize!r} is not something a plan can make small; known: {', '.join(MINIMIZABLE)}."
                f"{did_you_mean(str(self.minimize), MINIMIZABLE)}"
            )
        object.__setattr__(self, "confident", _truth("confident", self.confident))
        if self.scheme is not None:
            object.__setattr__(self, "scheme", str(_scheme_for_all(self.scheme)))
            self._require_beside_scheme()
        if not self.asked and self.scheme is None:
            raise InvalidRequest(f"The budget names no limit. {_UNDERSTOOD}")
        if self.file_size is not None and self.accuracy_drop is not None:
            raise InvalidRequest("file_size beside accuracy_drop is not supported yet: limit size, all tensors in it.")
        if self.confident and self.accuracy_drop is None:
            raise InvalidRequest("confident=true goes with a limit on accuracy: add accuracy_drop.")

    def _require_beside_scheme(self) -> None:
        """Raise InvalidRequest for what goes with choosing: a scheme leaves nothing to choose."""
        given = [name for name in self.asked if name not in BESIDE_A_SCHEME] + (["minimize"] if self.minimize else [])
        if given:
            raise InvalidRequest(
                f"{given[0]} beside the scheme {self.scheme}: a scheme leaves nothing to choose. Limits that are "
                f"checked beside one: {', '.join(BESIDE_A_SCHEME)}. Leave {given[0]} out, or the scheme."
            )

    @property
    def asked(self) -> dict[str, str]:
        """The limits this budget sets, name -> canonical text of the amount."""
        texts = {name: getattr(self, name) for name in LIMITS if getattr(self, name) is not None}
        return {name: value if isinstance(value, str) else f"{value} bits" for name, value in texts.items()}

    @classmethod
    def parse(cls, budget: str | Scheme | Mapping[str, str | int | float | None] | Budget) -> Budget:
        """Read a budget from text, from a scheme, from a mapping limit -> amount, or from itself."""
        if isinstance(budget, Budget):
            return budget
        if isinstance(budget, Scheme):
            return cls(scheme=budget)
        if isinstance(budget, Mapping):
            return cls._from_mapping(budget)
        if not isinstance(budget, str):
            found = (
                f"{budget!r} has no unit" if len(repr(budget)) <= _LONGEST else f"a {type(budget).__name__} is none"
            )
            raise InvalidRequest(f"A budget is text, a mapping or a Budget; {found}. {_UNDERSTOOD}")
        amounts: dict[str, str] = {}
        for item in budget.split(","):
            key, equals, value = item.partition("=")
            name = key.strip().replace(" ", "_") if equals else _limit_of(item, budget)
            if name in amounts:
                raise InvalidRequest(f"The budget {budget!r} sets {name} twice: keep the tighter one.")
            amounts[name] = value.strip() if equals else item.strip()
        return cls._from_mapping(amounts)

    @classmethod
    def _from_mapping(cls, amounts: Mapping[str, str | int | float | bool | None]) -> Budget:
        known = [field.name for field in fields(cls)]
        for name in amounts:
            if name not in known:
                raise InvalidRequest(
                    f"{name!r} is not a limit.{did_you_mean(str(name), known[:-1])} Known limits: {', '.join(known)}."
                )
        return cls(**amounts)  # type: ignore[arg-type]  # minimize is checked where it is used

    def limits(self, profile: Profile) -> dict[str, int]:
        """The limits as integers for a profiled model: ``size`` in bytes of everything stored, ``average_bits`` in
        packed bytes of the layers' weights, ``bops`` in bit-operations, ``latency`` in nanoseconds of a batch,
        ``activation_bytes`` in bytes for one sample. Raises InvalidRequest for a limit that needs more than this
        profile to be met."""
        if self.accuracy_drop is not None or self.minimize is not None:
            raise InvalidRequest(
                "A limit on accuracy is met by evaluating plans, which needs the model: use quantize with "
                "evaluate=. minimize goes with it."
            )
        if self.file_size is not None:
            raise InvalidRequest(
                f"file_size={self.file_size} is met by writing files, which needs the model: use quantize. size "
                "limits all tensors of the file without that."
            )
        if self.latency is not None and profile.latency is None:
            raise InvalidRequest(
                f"latency={self.latency} needs times measured on this machine: run `quantkit bench RECIPE` and pass "
                "the file it writes as target."
            )
        if self.activation_bytes is not None and profile.sites and not profile.operations:
            raise InvalidRequest(
                f"activation_bytes={self.activation_bytes} needs to know which operations make and read the sites, "
                "and this profile does not say. Profile again."
            )
        if self.bops is not None and not any(layer.macs for layer in profile.layers.values()):
            raise InvalidRequest(
                f"bops={self.bops} needs the multiply-accumulates of the layers, and this model was not traced: pass "
                "example_inputs=, one batch of its inputs, or calibration=."
            )
        return {name: math.floor(self._absolute(name, profile)) for name in self.asked}

    @property
    def file_bytes(self) -> int:
        """The limit on the file, in bytes. Raises InvalidRequest where there is none."""
        if self.file_size is None:
            raise InvalidRequest(f"The budget {self} does not limit the size of the file.")
        number, unit = _read("file_size", self.file_size)
        return math.floor(number * UNITS["file_size"][unit])

    def in_file_unit(self, amount: int) -> float:
        """Bytes of a file in the unit the user wrote, rounded up to 3 decimals."""
        return math.ceil(1000 * amount / Fraction(UNITS["file_size"][self.unit("file_size")])) / 1000

    def with_tensors(self, most: int, profile: Profile) -> Budget:
        """The other limits and the file's tensors limited to ``most`` bytes, or to ``size`` where that is less."""
        others = {name: getattr(self, name) for name in (*LIMITS, "scheme") if name not in ("file_size", "size")}
        if self.size is not None:
            most = min(most, math.floor(self._absolute("size", profile)))
        return Budget(**others, size=f"{max(most, 1)} B")

    def without_accuracy(self) -> Budget | None:
        """The limits beside that on accuracy; None where there are none."""
        others = {name: getattr(self, name) for name in (*LIMITS, "scheme") if name != "accuracy_drop"}
        return Budget(**others) if any(value is not None for value in others.values()) else None

    def at_most(self, name: str, amount: int, profile: Profile) -> Budget:
        """The limits beside that on accuracy, and ``name`` limited to ``amount`` of what ``limits`` counts."""
        others = {other: getattr(self, other) for other in LIMITS if other not in ("accuracy_drop", name)}
        if name != "average_bits":
            return Budget(**others, **{name: f"{amount} {_COUNTED_IN[name]}"})
        bits = Fraction(amount) / unit_size(name, "bits", profile)
        return Budget(**others, average_bits=math.ceil(bits * 10**9) / 10**9)

    def allowed_drop(self, reference: float) -> float:
        """The largest drop of the metric from ``reference``, that of the float model. Raises InvalidRequest where the
        budget does not limit it."""
        if self.accuracy_drop is None:
            raise InvalidRequest(f"The budget {self} does not limit the accuracy drop.")
        number, unit = _read("accuracy_drop", self.accuracy_drop)
        return float(number) * (abs(reference) / 100 if unit == "%" else 1)

    def _absolute(self, name: str, profile: Profile) -> Fraction:
        number, unit = _read(name, self.asked[name])
        return number * unit_size(name, unit, profile)

    def in_asked_unit(self, name: str, amount: int, profile: Profile) -> float:
        """An amount of what ``limits`` counts, in the unit the user wrote, rounded up to 3 decimals: asking for it
        works."""
        _, unit = _read(name, self.asked[name])
        return math.ceil(1000 * amount / unit_size(name, unit, profile)) / 1000

    def unit(self, name: str) -> str:
        """The unit the user wrote for a limit ("KB", "%", "bits", "")."""
        return _read(name, self.asked[name])[1]

    def __str__(self) -> str:
        bare = ("size", "average_bits")
        items = [str(self.scheme)] if self.scheme is not None else []
        items += [text if name in bare else f"{name}={text}" for name, text in self.asked.items()]
        items += [f"minimize={self.minimize}"] if self.minimize else []
        return ", ".join(items + (["confident=true"] if self.confident else []))


def unit_size(name: str, unit: str, profile: Profile) -> Fraction:
    """How much one of ``unit`` is of what ``Budget.limits`` counts for a model."""
    if name == "average_bits":
        return Fraction(sum(layer.weights for layer in profile.layers.values()), 8)
    if unit != "%":
        return Fraction(UNITS[name][unit])
    if name == "latency":
        assert profile.latency is not None, "checked before"
        return Fraction(profile.latency.float_ns, 100)
    macs = sum(layer.macs for layer in profile.layers.values())
    return Fraction(_float32_bytes(profile) if name == "size" else FLOAT_BITS**2 * macs, 100)


def _float32_bytes(profile: Profile) -> int:
    if profile.float32_bytes:
        return profile.float32_bytes
    return profile.float_bytes + sum(4 * layer.weights - layer.float_bytes for layer in profile.layers.values())


def _read(name: str, asked: object) -> tuple[Fraction, str]:
    """(number, unit) of an amount; raises InvalidRequest saying what was asked and what is understood."""
    text = str(asked).strip()
    if not isinstance(asked, str | int | float) or isinstance(asked, bool):
        raise InvalidRequest(f"{name}={asked!r} is not an amount. {_UNDERSTOOD}")
    number, word = _split(text)
    if number is None or word is None:
        raise InvalidRequest(f"Cannot read {name}={text!r}. {_UNDERSTOOD}")
    unit = _unit(name, word) if word else _UNIT_OF_NUMBER.get(name)
    if unit is None:
        raise InvalidRequest(f"{name}={text!r} needs a unit: {', '.join(u for u in UNITS[name] if u)}.")
    if not number.is_finite() or number <= 0 or abs(number.adjusted()) > _LARGEST_EXPONENT:
        raise InvalidRequest(f"{name}={text!r}: a limit is a finite number above zero, 1e-30 to 1e30. {_UNDERSTOOD}")
    return Fraction(number), unit


def read_bytes(name: str, asked: object) -> int:
    """The bytes of an amount such as "4 GB", called ``name`` in errors. Raises InvalidRequest for what is none."""
    number, word = _split(str(asked).strip())
    unit = next((u for u in _BYTES if word and u.lower() == _OTHER_SPELLINGS.get(word.lower(), word).lower()), None)
    if number is None or unit is None or not 1 <= number * _BYTES[unit] < 1 << 62:
        raise InvalidRequest(f"{name}={asked!r} is not an amount of memory such as '4 GB'.")
    return int(number * _BYTES[unit])


def _truth(name: str, asked: object) -> bool:
    word = str(asked).strip().lower()
    if word not in ("true", "false"):
        raise InvalidRequest(f"{name}={asked!r} is neither true nor false.")
    return word == "true"


def _split(text: str) -> tuple[Decimal | None, str | None]:
    match = _AMOUNT.fullmatch(text)
    if match is None:
        return None, None
    return Decimal(match["number"].replace("_", "")), match["unit"]


def _unit(name: str, word: str) -> str | None:
    """The canonical spelling of a unit of this limit; None where it has no such unit."""
    word = _OTHER_SPELLINGS.get(word.lower(), word)
    return next((u for u in UNITS[name] if u.lower() == word.lower()), None)


def _scheme_for_all(asked: object) -> Scheme:
    """A scheme that layers can take; raises InvalidRequest for float and for activations alone."""
    scheme = Scheme.parse(asked)  # type: ignore[arg-type]  # it says what it cannot read
    if scheme.weight is None:
        what = "quantizes nothing" if scheme.is_float else "has no weight format"
        raise InvalidRequest(f"The budget {str(asked)!r} {what}: ask for a scheme such as 'w8a8' or 'w4'.")
    return scheme


def _limit_of(item: str, budget: str) -> str:
    """Which limit an amount without a name sets, by its unit; "scheme" for what is written as one."""
    if item.strip().lower() == "float" or _LIKE_A_SCHEME.match(item.strip()):
        return "scheme"
    _, word = _split(item.strip())
    for name in ("average_bits", "size"):
        if word and _unit(name, word):
            return name
    raise InvalidRequest(
        f"Cannot read the budget {budget!r}: {item.strip()!r} is not an amount with a unit. {_UNDERSTOOD}"
    )


def _canonical(name: str, number: Fraction, unit: str) -> str | int | float:
    """Shortest text that reads back as the same amount; average bits as a plain number."""
    plain = int(number) if number.denominator == 1 else float(number)
    if name == "average_bits":
        return plain
    return f"{plain}{unit if unit in ('', '%') else ' ' + unit}"
