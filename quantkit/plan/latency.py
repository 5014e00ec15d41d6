"""Measured times of a model's parts on one machine, and what a plan takes by them.

The time of a plan is a sum: every layer and every integer operation in float or on codes, what happens to the tensor
of every site between them (moving, changing its layout), a conversion where a tensor is made in one form and read in
the other, and a rest that no plan changes. Times are whole nanoseconds for one batch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from quantkit.errors import InvalidRequest
from quantkit.plan.operations import Execution

FULL_BITS = 8


@dataclass(frozen=True)
class OperationTime:
    """A layer or an integer operation: in float, on codes, and on codes with weights of full bytes."""

    float_ns: int
    integer_ns: int
    wide_ns: int

    def of(self, bits: int | None) -> int:
        """Nanoseconds with weights of so many bits; None: in float."""
        if bits is None:
            return self.float_ns
        return self.wide_ns if bits >= FULL_BITS else self.integer_ns


@dataclass(frozen=True)
class SiteTime:
    """What happens to a site's tensor between its maker and its readers when it is float and when it holds codes, and
    the conversions: ``quantize_ns`` where it is made in float, ``dequantize_ns`` where something reads it in float.
    """

    float_ns: int
    codes_ns: int
    quantize_ns: int
    dequantize_ns: int


@dataclass(frozen=True)
class LatencyTable:
    """Times of one model, measured by ``quantkit bench``. ``model`` identifies its layers and their shapes, ``notes``
    say where, when and how it was measured.
    """

    model: str
    threads: int
    batch: int
    rest_ns: int
    operations: dict[str, OperationTime]
    sites: dict[str, SiteTime]
    notes: dict[str, Any] = field(default_factory=dict)

    def predict(self, execution: Execution) -> int:
        """Nanoseconds of a batch. Sites and operations that the execution does not know are float."""
        operations = sum(time.of(bits_of(name, execution)) for name, time in self.operations.items())
        return self.rest_ns + operations + sum(site_ns(t, n, execution) for n, t in self.sites.items())

    @property
    def float_ns(self) -> int:
        """Nanoseconds of the float model."""
        nothing: frozenset[str] = frozenset()
        return self.predict(Execution(nothing, nothing, nothing, nothing))

    def require(self, model: str, operations: Collection[str], sites: Collection[str]) -> None:
        """Raise InvalidRequest where the table was measured on another model."""
        for kind, names, known in (("layer", operations, self.operations), ("site", sites, self.sites)):
            missing = [name for name in names if name not in known]
            if missing:
                raise InvalidRequest(
                    f"The target's latency table was measured on another model: it has no time for the {kind} "
                    f"{missing[0]!r}. Run `quantkit bench RECIPE` for this one."
                )
        if self.model != model:
            raise InvalidRequest(
                "The target's latency table was measured on a model with the same layer names and other shapes. Run "
                "`quantkit bench RECIPE` for this one."
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LatencyTable:
        """From plain data; raises KeyError, TypeError or ValueError for anything that is no such table."""
        values = {name: data[name] for name in cls.__dataclass_fields__}
        if unknown := sorted(data.keys() - values.keys()):
            raise ValueError(f"unknown key {unknown[0]!r}")
        values["operations"] = {n: OperationTime(**_times(n, t)) for n, t in data["operations"].items()}
        values["sites"] = {n: SiteTime(**_times(n, t)) for n, t in data["sites"].items()}
        _times("", {name: values[name] for name in ("threads", "batch", "rest_ns")})
        if not isinstance(values["model"], str) or not isinstance(values["notes"], dict):
            raise TypeError("model is not text, or notes are no table")
        return cls(**values)


def bits_of(name: str, execution: Execution) -> int | None:
    """The width by which a layer or operation is timed under an execution."""
    if name not in execution.integer:
        return None
    return FULL_BITS if name in execution.wide else FULL_BITS - 1


def _times(name: str, times: Mapping[str, Any]) -> Mapping[str, int]:
    for key, value in times.items():
        if type(value) is not int or value < 0:
            raise ValueError(f"{name}.{key} is {value!r}, not a whole number of at least 0".lstrip("."))
    return times


def site_ns(time: SiteTime, name: str, execution: Execution) -> int:
    """Nanoseconds of a site's tensor under an execution."""
    if name not in execution.coded:
        return time.float_ns
    made = time.quantize_ns if name in execution.quantized else 0
    return time.codes_ns + made + (time.dequantize_ns if name in execution.dequantized else 0)
