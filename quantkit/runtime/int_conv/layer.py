"""A two-dimensional convolution on integers: windows of the padded codes as rows of an integer linear layer.

Codes lie as (image, row, column, channel), so that a window is a few runs of bytes, and the output comes out in
torch's ``channels_last`` order, which the next layer reads without moving anything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantkit.numbers.uniform import QuantizedWeight, SiteRange
from quantkit.program.convolutions import padded_sides, per_axis
from quantkit.progress import notice
from quantkit.runtime.int_conv.reference import int_conv_reference
from quantkit.runtime.int_linear import compiled
from quantkit.runtime.int_linear.compiled import quantize_padded_compiled, windows_compiled
from quantkit.runtime.int_linear.held import HeldWeight, OnHeldWeight
from quantkit.runtime.int_linear.layer import integer_offset
from quantkit.runtime.int_linear.panels import Panels

WINDOW_BYTES = 1 << 24  # of window rows at a time
Pair = tuple[int, ...]  # down and right
Border = tuple[int, int, int, int]


class IntConv(OnHeldWeight):
    """Replaces the torch call of a convolution: ``forward`` takes the function and its options as the call had them.

    Two-dimensional convolutions without groups run on the compiled kernels; all others, and installations without the
    kernels, through the reference, with a notice.
    """

    offset: Tensor | None
    bias: Tensor | None

    def __init__(
        self, weight: QuantizedWeight, bias: Tensor | None, site: SiteRange, expand: bool = False, name: str = ""
    ) -> None:
        super().__init__()
        self.shape, self.site, self.name = tuple(weight.codes.shape), site, name
        by_window = weight.codes.movedim(1, -1).flatten(1).contiguous()  # (channels, inputs), the input channel last
        flat = QuantizedWeight(by_window, weight.scale, weight.zero_point, weight.format)
        self.weight = HeldWeight(flat, expand)
        self.register_buffer("offset", integer_offset(weight, bias, site))
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())
        self.told = False

    def quantized(self) -> QuantizedWeight:
        """The weight as it came in."""
        flat = self.weight.quantized()
        codes = flat.codes.reshape(self.shape[0], *self.shape[2:], self.shape[1]).movedim(-1, 1).contiguous()
        return QuantizedWeight(codes, flat.scale, flat.zero_point, flat.format)

    def forward(
        self, convolve: Any, x: Tensor, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
    ) -> Tensor:
        panels = self._panels(x, groups)
        if panels is None:
            self._tell(groups)
            operands = (x.float(), self.site, self.quantized(), self.bias)
            return int_conv_reference(convolve, *operands, stride, padding, dilation, groups).to(x.dtype)
        batched = x.float() if x.dim() == 4 else x.float().unsqueeze(0)
        kernel, steps, spread = self.shape[2:], per_axis(stride, 2), per_axis(dilation, 2)
        (top, bottom), (left, right) = padded_sides(padding, kernel, spread)
        border = top, bottom, left, right
        at_once = max(1, WINDOW_BYTES // max(1, batched[0, 0].numel() * panels.padded_inputs))
        found = [self._convolved(part, panels, border, kernel, steps, spread) for part in batched.split(at_once)]
        done = found[0] if len(found) == 1 else torch.cat(found)
        return (done if x.dim() == 4 else done.squeeze(0)).to(x.dtype)

    def _panels(self, x: Tensor, groups: int) -> Panels | None:
        """Panels for the compiled kernels; None for what only the reference runs."""
        fast = len(self.shape) == 4 and groups == 1 and x.numel() > 0 and self.offset is not None
        return self.weight.runnable() if fast and compiled.instruction_set() is not None else None

    def _tell(self, groups: int) -> None:
        if not self.told:
            what = f"a convolution with {groups} groups" if groups > 1 else f"this {len(self.shape) - 2}-d convolution"
            notice(f"Layer {self.name!r}: {what} has no integer kernel here and runs on integers in float.")
        self.told = True

    def _convolved(
        self, x: Tensor, panels: Panels, border: Border, kernel: Pair, stride: Pair, dilation: Pair
    ) -> Tensor:
        site = self.site
        last = x.permute(0, 2, 3, 1).contiguous()
        codes = quantize_padded_compiled(last, border, site.scale, site.zero_point, site.high)
        rows, (height, width) = windows_compiled(codes, kernel, stride, dilation, panels.padded_inputs)
        out = self.weight(rows, torch.full((len(rows),), site.scale, dtype=torch.float32, device="cpu"), self.offset)
        return out.reshape(len(x), height, width, self.shape[0]).permute(0, 3, 1, 2)
