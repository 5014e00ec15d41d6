"""From a layer's float weight to its codes in one or several formats, by a rounding of the registry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.formats import WeightFormat
from quantkit.numbers.half import HalfWeight
from quantkit.numbers.kinds import AnyWeight, rounded_weight
from quantkit.progress import warn
from quantkit.rounding import ROUNDINGS, Moments, require_numbers, rounding_of


@dataclass(frozen=True)
class Rounded:
    """A layer's weight per format and how its codes were found: the rounding used, the damping its Hessian needed, and
    the blocks of inputs that it was kept for; where there are none, that it is float16.
    """

    weights: dict[WeightFormat, AnyWeight]
    rounding: str
    damping: float = 0.0
    blocks: int = 1


def quantize_weight(
    weight: Tensor,
    formats: Sequence[WeightFormat],
    moments: Moments | None = None,
    groups: int = 1,
    rounding: str = "auto",
) -> Rounded:
    """Codes of ``weight`` (output channels first) in each format.

    A rounding that needs the Hessian of the layer's inputs gets it with ``moments``; without them, or where it cannot
    be factored, the weight is rounded to nearest. ``groups`` is the convolution's. Computed in float32 unless the
    weight is float64, on the CPU, where codes stay. Float16 values are the nearest ones whatever the rounding.
    """
    found: dict[WeightFormat, AnyWeight] = {format: HalfWeight.of(weight) for format in formats if format.is_half}
    if len(found) == len(formats):
        return Rounded(found, HalfWeight.kind)
    require_numbers(rounding, formats)
    method = rounding_of(rounding)
    if method.hessian and (moments is None or moments.factor is None):
        method = ROUNDINGS["nearest"]
    rows = weight.detach().cpu().reshape(groups, weight.shape[0] // groups, -1)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    for format in formats:
        if format not in found:
            able = method if format.is_integer or method.minifloats else ROUNDINGS["nearest"]
            codes, scale, zero = able.codes(rows, format, moments)
            held = (weight.shape[0], -1)
            found[format] = rounded_weight(
                codes.reshape(weight.shape), scale.reshape(held), zero.reshape(held), format
            )
    factor = moments.factor if method.factored and moments is not None else None
    damping = 0.0 if factor is None else factor.factor.damping
    return Rounded(found, method.name, damping, moments.count if method.hessian and moments is not None else 1)


def rounding_note(layer: str, rounded: Rounded, asked: str) -> str:
    """One phrase on how a layer was rounded; warns where its inputs were to be used and could not be."""
    if rounded.rounding == HalfWeight.kind:
        return "nearest float16"
    if rounded.rounding != rounding_of(asked).name:
        warn(f"{layer}: the Hessian of its inputs is not known or cannot be factored; rounded to nearest")
    factored = rounding_of(rounded.rounding).factored
    damping = f", damping {rounded.damping:g}" if factored else ""
    blocks = f", in {rounded.blocks} blocks of inputs" if rounded.blocks > 1 else ""
    return f"{rounded.rounding}{damping}{blocks}"
