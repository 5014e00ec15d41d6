"""Weights in the order the compiled kernels read them: the same codes and scales in the same number of bytes.

Sixteen output channels form a panel, four inputs of one channel lie side by side (``job.h`` draws it), and codes are
unsigned. Weights that do not fill panels are padded, where the caller asks for it; then they take more bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from quantkit.errors import InvalidRequest

PANEL = 16
_INPUTS = {4: 8, 8: 4}  # a group of inputs is a multiple of this


@dataclass(frozen=True)
class Panels:
    """``codes`` uint8 and ``scale`` float32 in panel order; ``channels`` and ``inputs`` without padding."""

    codes: Tensor
    scale: Tensor
    bits: int
    channels: int
    inputs: int

    @property
    def groups(self) -> int:
        return self.scale.shape[1]

    @property
    def padded_channels(self) -> int:
        return self.scale.shape[0] * PANEL

    @property
    def padded_inputs(self) -> int:
        return self.codes.numel() * 8 // self.bits // self.padded_channels

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes


def misfit(channels: int, inputs: int, groups: int, bits: int) -> str | None:
    """Why a weight does not fill panels, None when it does."""
    if bits not in _INPUTS:
        return f"{bits}-bit codes have no panels, only 4 and 8 bits"
    if channels % PANEL:
        return f"{channels} output channels are no multiple of {PANEL}"
    if inputs % groups or inputs // groups % _INPUTS[bits]:
        return f"groups of {inputs / groups:g} inputs are no multiple of {_INPUTS[bits]}"
    return None


def to_panels(codes: Tensor, scale: Tensor, bits: int, pad: bool = False) -> Panels:
    """Signed ``codes`` (channels, inputs) and ``scale`` (channels, groups) as panels of ``bits`` (4 or 8).

    ``pad`` fills up channels, and inputs where there is one group, with zeros; without it a weight that does not fill
    its panels raises InvalidRequest.
    """
    channels, inputs = codes.shape
    if pad and scale.shape[1] == 1:
        codes = F.pad(codes, (0, -inputs % _INPUTS[bits]))
    if pad:
        codes, scale = F.pad(codes, (0, 0, 0, -channels % PANEL)), F.pad(scale, (0, 0, 0, -channels % PANEL))
    if reason := misfit(codes.shape[0], codes.shape[1], scale.shape[1], bits):
        raise InvalidRequest(f"This weight does not fill panels: {reason}. Run it through the reference.")
    unsigned = codes.contiguous().view(torch.uint8) + (1 << bits - 1)  # modulo 256
    quads = unsigned.reshape(len(codes) // PANEL, PANEL, -1, 4).transpose(1, 2)
    if bits == 4:
        pairs = quads.unflatten(1, (-1, 2))
        quads = pairs[:, :, 0] | pairs[:, :, 1] << 4
    scales = scale.float().reshape(len(codes) // PANEL, PANEL, -1).transpose(1, 2)
    return Panels(quads.contiguous(), scales.contiguous(), bits, channels, inputs)


def from_panels(panels: Panels) -> tuple[Tensor, Tensor]:
    """(int8 codes, float32 scales) as they went into ``to_panels``."""
    quads = panels.codes
    if panels.bits == 4:
        quads = torch.stack((quads & 15, quads >> 4), 2).flatten(1, 2)
    unsigned = quads.transpose(1, 2).reshape(panels.padded_channels, -1)
    codes = (unsigned - (1 << panels.bits - 1)).view(torch.int8)[: panels.channels, : panels.inputs]
    scale = panels.scale.transpose(1, 2).reshape(panels.padded_channels, -1)[: panels.channels]
    return codes.contiguous(), scale.contiguous()
