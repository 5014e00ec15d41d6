"""A linear layer with 4-bit weights and 16-bit activations on torch's ``_weight_int4pack_mm_for_cpu``.

That operator is fast for bfloat16 activations only, so others are rounded to bfloat16 on the way in. Measured against
float32 (``tools/bench_kernels.py``; AVX2, 2048 inputs and channels, one thread): 1.8 to 2.1 x at 1 row, 1.4 x at 16,
0.6 x at 128. So from ``MANY_ROWS`` rows on it is slower than float: ``expand=True`` keeps the float32 weight for those
calls, its bytes counted apart.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantkit.errors import InvalidRequest
from quantkit.numbers.uniform import QuantizedWeight

GROUPS = (32, 64, 128, 256)
CHANNELS = 16
MANY_ROWS = 32
_INNER_TILES = 2  # any value: the operator's CPU layout does not depend on it


class WeightOnlyLinear(nn.Module):
    """Replaces a Linear layer; symmetric or zero-point 4-bit weights in groups of 32, 64, 128 or 256 inputs."""

    codes: Tensor
    scale_and_shift: Tensor
    bias: Tensor | None
    expanded: Tensor | None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None, expand: bool = False) -> None:
        """Raises InvalidRequest for a weight the operator does not take."""
        super().__init__()
        channels, self.inputs = weight.codes.shape
        self.group = self.inputs // weight.scale.shape[1]
        if weight.format.fmt != "4" or self.group not in GROUPS or channels % CHANNELS:
            raise InvalidRequest(
                f"Weight-only kernels run 4 bits in groups of {', '.join(map(str, GROUPS))} inputs and channels in "
                f"multiples of {CHANNELS}, not {weight.format} of shape {tuple(weight.codes.shape)}."
            )
        unsigned = weight.codes.to(torch.int32) + 8
        shift = torch.zeros_like(weight.scale) if weight.zero_point is None else -weight.zero_point * weight.scale
        both = torch.stack((weight.scale.t(), shift.t()), -1).bfloat16().contiguous()
        self.register_buffer("codes", torch._convert_weight_to_int4pack_for_cpu(unsigned, _INNER_TILES))
        self.register_buffer("scale_and_shift", both)
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())
        self.register_buffer("expanded", weight.dequantize() if expand else None)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.inputs or not x.is_floating_point():
            raise InvalidRequest(
                f"This layer reads floating-point rows of {self.inputs} inputs, not {x.dtype} of shape "
                f"{tuple(x.shape)}."
            )
        rows = x.detach().reshape(-1, self.inputs)
        if self.expanded is not None and len(rows) >= MANY_ROWS:
            out = F.linear(rows.float(), self.expanded)
        elif len(rows) == 0:
            out = rows.new_zeros(0, self.scale_and_shift.shape[1])
        else:
            rows = rows.bfloat16().contiguous()
            out = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.codes, self.group, self.scale_and_shift)
        out = out.to(x.dtype) if self.bias is None else (out.float() + self.bias).to(x.dtype)
        return out.reshape(*x.shape[:-1], -1) if len(rows) else out.reshape(*x.shape[:-1], out.shape[1])

    @property
    def weight_bytes(self) -> int:
        """Bytes of codes, scales and shifts held: those of ``w4g<group>`` with float32 scales."""
        return self.codes.nbytes + self.scale_and_shift.nbytes

    @property
    def expanded_bytes(self) -> int:
        return 0 if self.expanded is None else self.expanded.nbytes
