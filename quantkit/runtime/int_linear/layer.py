"""A linear layer that computes on integers: quantized input, integer sums, float32 output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import InvalidRequest
from quantkit.numbers.ratios import divided
from quantkit.numbers.uniform import QuantizedWeight, SiteRange
from quantkit.runtime.int_linear import compiled
from quantkit.runtime.int_linear.compiled import DynamicLinear, quantize_padded_compiled, quantize_rows_compiled
from quantkit.runtime.int_linear.held import HeldWeight, OnHeldWeight
from quantkit.runtime.int_linear.reference import quantize_rows

CENTRE = 128  # unsigned codes less this fit a signed byte
LARGEST_PRODUCT = CENTRE * CENTRE
_INT32 = torch.iinfo(torch.int32)


def centred_codes(x: Tensor, site: SiteRange) -> Tensor:
    """int8: the unsigned codes of float32 values at a site, less ``CENTRE``."""
    if compiled.instruction_set() is not None:
        rows = x.contiguous().reshape(1, 1, -1, x.shape[-1]) if x.numel() else x.reshape(0, 1, 1, 1)
        codes = quantize_padded_compiled(rows, (0, 0, 0, 0), site.scale, site.zero_point, site.high)
        return codes.reshape(x.shape)
    return (site.quantize(x).codes - CENTRE).to(torch.int8)


def integer_offset(weight: QuantizedWeight, bias: Tensor | None, site: SiteRange) -> Tensor | None:
    """What to add to the sums of centred codes: the bias on the grid of the sums, and what centring took away.

    None where there is no such grid (several scales per channel) or 32 bits do not hold it.
    """
    if weight.scale.shape[1] != 1 or weight.zero_point is not None:
        return None
    sums = weight.codes.flatten(1).sum(1, dtype=torch.int64)
    offset = (CENTRE - site.zero_point) * sums
    if bias is not None:
        step = site.scale * weight.scale.squeeze(1)
        offset = offset + torch.round(bias.detach() / step).to(torch.int64)
    room = LARGEST_PRODUCT * weight.codes.flatten(1).shape[1]
    if offset.numel() and int(offset.abs().max()) + room > _INT32.max:
        return None
    return offset.to(torch.int32)


class IntLinear(OnHeldWeight):
    """Replaces a Linear layer. ``site`` is the static quantizer of its input; None quantizes every row by itself."""

    offset: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None = None,
        site: SiteRange | None = None,
        expand: bool = False,
    ) -> None:
        """Raises InvalidRequest for a weight that integer kernels do not run, or a static input that needs several
        scales per channel.
        """
        super().__init__()
        self.weight = HeldWeight(weight, expand)
        self.inputs, self.ratio = self.weight.inputs, weight.ratio
        site = None if site is None else replace(site, ratio=())  # what is read is divided in ``forward``
        self.site = site
        offset = None
        if site is not None:
            offset = integer_offset(weight, bias, site)
            if offset is None:
                raise InvalidRequest(
                    f"A static input needs a weight with one scale per channel, no zero points and a bias within 32 "
                    f"bits; this is {weight.format}. Quantize its input per row, or simulate it."
                )
            bias = None
        self.register_buffer("offset", offset)
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())
        self._prepare()

    def _prepare(self) -> None:
        """Set up the single call that serves dynamic inputs; its addresses are those of this module's own tensors."""
        plain = self.site is None and self.weight.expanded is None
        panels = self.weight.held_panels() if plain and self.weight.in_panels else None
        self.at_once = None if panels is None else DynamicLinear(panels, self.bias)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "at_once"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IntLinear:
        super()._apply(fn, recurse)
        self._prepare()
        return self

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.inputs or not x.is_floating_point():
            raise InvalidRequest(
                f"This layer reads floating-point rows of {self.inputs} inputs, not {x.dtype} of shape "
                f"{tuple(x.shape)}."
            )
        x = divided(x, self.ratio)
        if self.at_once is not None and x.dtype == torch.float32 and x.is_contiguous() and x.numel():
            return self.at_once(x)
        rows = x.detach().reshape(-1, self.inputs).float()
        if self.site is not None:
            codes = centred_codes(rows, self.site)
            scale = torch.full((len(rows),), self.site.scale, dtype=torch.float32, device="cpu")
        else:
            fast = compiled.instruction_set() is not None
            codes, scale = quantize_rows_compiled(rows.contiguous()) if fast else quantize_rows(rows)
        out = self.weight(codes, scale, self.offset, self.bias)
        return out.reshape(*x.shape[:-1], self.weight.channels).to(x.dtype)

    def quantized(self) -> QuantizedWeight:
        """The weight as it came in."""
        return replace(self.weight.quantized(), ratio=self.ratio)
