"""Roundings by name: a dict and a decorator, with what each has to know of a layer's inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from quantkit.errors import InvalidRequest
from quantkit.formats import WeightFormat
from quantkit.rounding.moments import Moments

# Codes as floats (groups, O, K), and scales and zero points (groups, O, scales), each for K / scales inputs in a row
Codes = tuple[Tensor, Tensor, Tensor]
RoundRows = Callable[[Tensor, WeightFormat, Moments | None], Codes]


@dataclass(frozen=True)
class Rounding:
    """A function of a weight's rows (groups, O, K), their format and the moments of the layer's inputs, and which of
    these it needs: the ``hessian``, the ``cross`` moments with the float network's inputs, where there are any, and
    whether the Hessian must have a factor (``factored``), whose damping is told. ``minifloats``: codes can be
    floating-point numbers. ``fisher``: of layers that have one, the Hessian is a factor of that of the network's loss.
    """

    name: str
    codes: RoundRows
    hessian: bool = False
    cross: bool = False
    factored: bool = False
    minifloats: bool = False
    fisher: bool = False


ROUNDINGS: dict[str, Rounding] = {}
AUTO, WITH_INPUTS, WITHOUT_INPUTS = "auto", "gptq", "hqq"  # what "auto" is with calibration inputs, and without any
BY_LOSS = "yaqa"  # and for narrow weights of models that read tokens


def rounding(name: str, **needs: bool) -> Callable[[RoundRows], RoundRows]:
    """Register a function under ``name`` with what it needs, by the fields of ``Rounding``."""

    def register(function: RoundRows) -> RoundRows:
        ROUNDINGS[name] = Rounding(name, function, **needs)
        return function

    return register


def rounding_of(name: str) -> Rounding:
    """The rounding of this name; "auto" stands for the one with inputs."""
    return ROUNDINGS[WITH_INPUTS if name == AUTO else name]


def require_numbers(rounding: str, formats: Iterable[WeightFormat | None]) -> None:
    """Raise InvalidRequest for formats whose codes a rounding that is asked for by name does not compute."""
    others = [format for format in formats if format is not None and not (format.is_integer or format.is_half)]
    if others and rounding != AUTO and not ROUNDINGS[rounding].minifloats:
        able = ", ".join(repr(name) for name, found in ROUNDINGS.items() if found.minifloats)
        raise InvalidRequest(
            f"rounding={rounding!r} computes whole numbers, and codes of {others[0]} are floating-point numbers: ask "
            f"for {able} or 'auto'."
        )


def names_without_inputs() -> tuple[str, ...]:
    """The roundings that look at the weight alone."""
    return tuple(name for name, found in ROUNDINGS.items() if not found.hessian)
