"""The weight a real integer layer keeps in memory, and the choice of the kernel that multiplies with it.

A 4- or 8-bit weight that fills panels is kept as panels: the bytes of its format, ready for the compiled kernels.
Every other weight is kept packed at its true width and expanded to 8 bits in each call, which costs time in proportion
to the weight and pays where a call has many rows. ``expand`` keeps that expansion: memory for time, counted apart.

What is chosen (``tools/bench_kernels.py`` prints the speeds over float32 and over the alternatives):

- With them, the compiled kernels at any number of rows: nothing else that is exact is faster, on AVX2 or AVX512-VNNI.
- Without them, torch's ``_int_mm`` where there is VNNI; on AVX2 that is slower than float32, so products go through
  float32, in parts that nothing rounds.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from quantkit.errors import InvalidRequest
from quantkit.formats import WeightFormat
from quantkit.numbers.packed_weight import PackedWeight, pack_weight, unpack_weight
from quantkit.numbers.uniform import QuantizedWeight
from quantkit.runtime.int_linear import compiled
from quantkit.runtime.int_linear.compiled import int_linear_compiled
from quantkit.runtime.int_linear.panels import Panels, from_panels, misfit, to_panels
from quantkit.runtime.int_linear.reference import Rows, require_inputs, require_operands
from quantkit.runtime.int_linear.through_torch import int_linear_torch


class HeldWeight(nn.Module):
    """Codes (channels, inputs) of an integer weight. ``nbytes`` are those of its format, but for the scales of panels,
    which are in float32; ``expanded_bytes`` the rest.

    ``zero_point`` is None in panels, ``shared_scale`` where scales are no ``sf8``.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    shared_scale: Tensor | None
    expanded: Panels | None

    def __init__(self, weight: QuantizedWeight, expand: bool = False) -> None:
        """Raises InvalidRequest for formats without integer codes of at most 8 bits."""
        super().__init__()
        self.format: WeightFormat = weight.format
        if not weight.format.is_integer or weight.format.bits > 8:
            raise InvalidRequest(f"Integer kernels run weights of 2 to 8 bits, not {weight.format}.")
        self.channels, self.inputs = weight.codes.shape
        require_inputs(self.inputs)
        self.in_panels = self._fills_panels(weight)
        if self.in_panels:
            panels = to_panels(weight.codes, weight.scale, weight.format.bits)
            held: dict[str, Tensor] = {"codes": panels.codes, "scale": panels.scale}
        else:
            tensors = pack_weight(weight).tensors("weight")
            held = {name.removeprefix("weight."): tensor for name, tensor in tensors.items()}
        for name in ("codes", "scale", "zero_point", "shared_scale"):
            self.register_buffer(name, held.get(name))
        self.expanded = _as_panels(weight) if expand and not self.in_panels else None

    def _fills_panels(self, weight: QuantizedWeight) -> bool:
        fits = misfit(self.channels, self.inputs, weight.scale.shape[1], weight.format.bits) is None
        return compiled.instruction_set() is not None and weight.zero_point is None and fits

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points, counted from the tensors held."""
        return sum(tensor.nbytes for tensor in self.buffers(recurse=False))

    @property
    def expanded_bytes(self) -> int:
        return 0 if self.expanded is None else self.expanded.nbytes

    def quantized(self) -> QuantizedWeight:
        """The codes and scales as they came in."""
        if self.in_panels:
            codes, scale = from_panels(self.held_panels())
            return QuantizedWeight(codes, scale, None, self.format)
        shape = (self.channels, self.inputs)
        return unpack_weight(
            PackedWeight(self.codes, self.scale, self.zero_point, shape, self.format, self.shared_scale)
        )

    def held_panels(self) -> Panels:
        return Panels(self.codes, self.scale, self.format.bits, self.channels, self.inputs)

    def runnable(self) -> Panels | None:
        """Panels for the compiled kernels, expanded for this call where none are held; None where there are none."""
        if self.in_panels:
            return self.held_panels()
        return _as_panels(self.quantized()) if self.expanded is None else self.expanded

    def forward(
        self, activations: Tensor, activation_scale: Tensor, offset: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """``int_linear_torch`` of int8 rows with this weight, bit for bit, by the fastest way there is. Rows may
        be filled up with zeros to the panels' inputs.
        """
        panels = self.runnable()
        if panels is None:
            weight, rows = self.quantized(), Rows(activations[:, : self.inputs], activation_scale)
            require_operands(rows.codes, self.inputs, weight.scale.shape[1], offset)
            return int_linear_torch(rows, weight.codes, weight.scale, weight.zero_point, offset, bias)
        filled = _filled(activations, panels.padded_inputs)
        assert filled is not None
        offset, bias = _filled(offset, panels.padded_channels), _filled(bias, panels.padded_channels)
        out = int_linear_compiled(Rows(filled, activation_scale), panels, offset, bias)
        return out if out.shape[1] == self.channels else out[:, : self.channels]


class OnHeldWeight(nn.Module):
    """A layer that computes with a held weight."""

    weight: HeldWeight

    @property
    def weight_bytes(self) -> int:
        return self.weight.nbytes

    @property
    def expanded_bytes(self) -> int:
        return self.weight.expanded_bytes


def _filled(tensor: Tensor | None, length: int) -> Tensor | None:
    """``tensor`` with zeros up to ``length`` in its last dimension; itself where it is that long."""
    missing = 0 if tensor is None else length - tensor.shape[-1]
    return F.pad(tensor, (0, missing)) if tensor is not None and missing else tensor


def _as_panels(weight: QuantizedWeight) -> Panels | None:
    """8-bit panels of any weight that has them on this machine."""
    if compiled.instruction_set() is None:
        return None
    codes, scale = weight.codes, weight.scale
    if weight.zero_point is not None:
        if weight.format.bits == 8:
            return None  # a difference of two 8-bit codes does not fit 8 bits
        codes = codes - weight.zero_point.repeat_interleave(codes.shape[1] // scale.shape[1], 1)
    if scale.shape[1] > 1 and misfit(16, codes.shape[1], scale.shape[1], 8):
        return None
    return to_panels(codes, scale, 8, pad=True)
