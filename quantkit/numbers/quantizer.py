"""What every kind of quantized number answers: its codes, what they stand for, what a file holds of it, and what is
asked by callers that have a form for some kinds only. ``numbers.kinds`` lists the kinds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

Q = TypeVar("Q", bound="Quantizer")


class Codes(NamedTuple):
    """Integers, and the scale they obey: of the whole tensor, of each row or of each group."""

    codes: Tensor
    scale: Tensor


class _StraightThrough(torch.autograd.Function):
    """Fake quantization whose gradient is 1 except where the value was clipped (Bengio et al., arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx, x, quantizer):
        ctx.quantizer = quantizer
        if quantizer.clips:
            ctx.save_for_backward(x)
        return quantizer.dequantize(quantizer.quantize(x))

    @staticmethod
    def backward(ctx, gradient):
        if ctx.quantizer.clips:
            gradient = gradient * ctx.quantizer.inside(*ctx.saved_tensors)
        return gradient, None


class Quantizer(Protocol):
    """One kind of quantized number: a frozen dataclass with ``bits``, the width of a code, and ``format``, as schemes
    write it. Flags are of Literal types there, so that a type checker knows the kinds that are left behind a test.
    """

    kind: ClassVar[str]  # its name in files and in tables of forms
    stored: ClassVar[bool]  # holds the codes of one tensor, a weight's; others quantize tensors as they come
    static: ClassVar[bool]  # scale and zero point are known before a tensor is
    scaled: ClassVar[bool] = True  # values are scales times codes, which those of float16 are not
    integer: ClassVar[bool]  # integer kernels read its codes: values are a scale times whole numbers
    clips: ClassVar[bool] = True  # values beyond the last code exist

    def quantize(self, x: Tensor) -> Codes: ...

    def dequantize(self, codes: Codes) -> Tensor: ...

    def inside(self, x: Tensor) -> Tensor:
        """Where ``x`` is not clipped."""
        return torch.ones_like(x, dtype=torch.bool)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """``dequantize(quantize(x))``: ``x`` as the runtime sees it, with straight-through gradients."""
        return _StraightThrough.apply(x, self)

    def to_dict(self) -> dict[str, Any]:
        """What ``from_dict`` reads again: the kind and the fields."""
        return {"kind": self.kind} | vars(self)

    @classmethod
    def from_dict(cls: type[Q], record: Mapping[str, Any]) -> Q:
        fields = {name: value for name, value in record.items() if name != "kind"}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})

    def fingerprint(self) -> bytes:
        """Bytes that two quantizers share only where they are equal."""
        return repr(self).encode()
