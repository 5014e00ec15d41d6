"""Weights that float16 cannot hold: layers for which ``w16`` is no candidate, or is refused by name."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.errors import InvalidRequest
from quantkit.formats import Scheme
from quantkit.numbers.half import half_problem
from quantkit.program.layers import Weights
from quantkit.progress import notice


def why_not_half(weights: Weights, layer: str, scheme: Scheme) -> str:
    """Why a layer's weight cannot be stored as a scheme stores it in float16; empty where it can, or is not to be."""
    return half_problem(weights[layer]) if scheme.weight is not None and scheme.weight.is_half else ""


def require_half(weights: Weights, layer: str, scheme: Scheme) -> None:
    """Raise InvalidRequest for a layer that is to be float16 and cannot."""
    if problem := why_not_half(weights, layer, scheme):
        raise InvalidRequest(
            f"Layer {layer!r} cannot be {scheme}: {problem}. Leave it float, or give it codes such as w8."
        )


def without_beyond_half(weights: Weights, allowed: Mapping[str, tuple[Scheme, ...]]) -> dict[str, tuple[Scheme, ...]]:
    """The candidates without float16 where a weight is beyond it, with a notice. Raises InvalidRequest where a layer
    has no other.
    """
    fitting = {}
    for name, options in allowed.items():
        problems = {scheme: why_not_half(weights, name, scheme) for scheme in options}
        fitting[name] = tuple(scheme for scheme in options if not problems[scheme])
        if not fitting[name]:
            require_half(weights, name, options[0])
        for scheme in options:
            if problems[scheme]:
                notice(f"{scheme} is no candidate for {name}: {problems[scheme]}")
    return fitting
