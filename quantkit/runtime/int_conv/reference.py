"""Integer convolution by its definition: a convolution of integers in a float type that does not round them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quantkit.numbers.uniform import QuantizedWeight, SiteRange
from quantkit.runtime.int_linear.through_torch import EXACT_IN_FLOAT


def int_conv_reference(
    convolve: Callable[..., Tensor],
    x: Tensor,
    site: SiteRange,
    weight: QuantizedWeight,
    bias: Tensor | None,
    *options: Any,
) -> Tensor:
    """float32 ``convolve(x, weight, bias, *options)``, for any of torch's convolutions, on the codes of ``x`` at
    ``site`` and of ``weight`` (one scale per channel).

    Integer sums take float32 where none can pass 2^24 and float64 otherwise, so they are exact in either; the bias is
    rounded to their grid.
    """
    codes = site.quantize(x).codes
    largest = int(weight.codes.flatten(1).to(torch.int32).abs().sum(1).max()) * site.high
    exact = torch.float32 if largest < EXACT_IN_FLOAT else torch.float64
    sums = convolve((codes - site.zero_point).to(exact), weight.codes.to(exact), None, *options)
    across = (-1, *[1] * (weight.codes.dim() - 2))
    scale = weight.scale.squeeze(1)
    if bias is not None:
        grid = torch.round(bias.detach() / (site.scale * scale))
        sums = (sums.double() + grid.double().reshape(across)).float()
    return sums.float() * scale.reshape(across) * site.scale
