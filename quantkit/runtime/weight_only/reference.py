"""A linear layer with 4-bit weights and bfloat16 activations, in plain math."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from quantkit.numbers.uniform import QuantizedWeight


def weight_only_reference(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """``x`` times the dequantized weight: activations, scales and zero points (as values) rounded to bfloat16, sums in
    float32.
    """
    scale = weight.scale.bfloat16().float()
    shift = torch.zeros_like(scale) if weight.zero_point is None else weight.zero_point * weight.scale
    grouped = weight.codes.reshape(*scale.shape, -1).float() * scale.unsqueeze(-1)
    values = grouped - shift.bfloat16().float().unsqueeze(-1)
    out = F.linear(x.bfloat16().float(), values.reshape(weight.codes.shape))
    return out if bias is None else out + bias
