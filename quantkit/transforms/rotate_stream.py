"""Turn residual streams by orthogonal matrices, without any change of what the model computes (R1 of QuaRot, Ashkboos
et al., arXiv 2404.00456, and SpinQuant, Liu et al., arXiv 2405.16406).

With x the stream and R the matrix, embeddings and tables x become x R, layers that write to it W become R^T W, their
biases b become b R, layers that read it W become W R. Norms between commute with R: the root mean square of x R is
that of x for any orthogonal R. A LayerNorm also subtracts the mean, x - x 1 1^T / D, and with R 1 = 1, so that 1^T R =
1^T, that is x R - x R 1 1^T / D = (x - x 1 1^T / D) R. No LayerNorm has to be replaced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.program.channels import mixed
from quantkit.program.halves import is_half
from quantkit.program.intercept import device_of
from quantkit.program.layers import Weights
from quantkit.transforms.norms import LAYER, normalizations
from quantkit.transforms.orthogonal import keeping_ones, random_hadamard
from quantkit.transforms.registry import TRANSFORMS, Proposal, Setting, Transform, recorded
from quantkit.transforms.residual_stream import ReadNorm, ResidualStream, residual_streams

NAME = "stream-rotation"


@dataclass(frozen=True)
class StreamRotation:
    """A residual stream turned by a Hadamard matrix with random signs, which keeps ones where a LayerNorm reads it."""

    stream: ResidualStream
    seed: int

    def record(self) -> dict[str, Any]:
        return {"transform": NAME, "at": self.stream.name, "seed": self.seed}

    @property
    def matrix(self) -> Tensor:
        matrix = random_hadamard(self.stream.width, torch.Generator().manual_seed(self.seed))
        return keeping_ones(matrix) if any(read.norm.kind == LAYER for read in self.stream.norms) else matrix

    def apply(self, weights: Weights) -> None:
        rotate_stream(weights, self.stream, self.matrix)


@torch.no_grad()
def rotate_stream(weights: Weights, stream: ResidualStream, matrix: Tensor) -> None:
    """Turn a stream in place, in float64; norms' gains go to the layers behind them."""
    gains: dict[str, Tensor] = {}
    for read in stream.norms:
        gain = _absorbed_gain(weights, read)
        _move_shift(weights, read, gain, matrix)
        gains |= dict.fromkeys(read.layers, gain)
    for layer in dict.fromkeys((*stream.readers, *stream.writers)):
        weight = weights[layer].double()
        if layer in gains:
            weight = weight * gains[layer].reshape(-1, *[1] * (weight.dim() - 2))
        if layer in stream.readers:
            weight = mixed(weight, matrix, 1)
        if layer in stream.writers:
            weight = mixed(weight, matrix, 0)
        weights.write(layer, weight)
    for name, axis in stream.tables:
        _set(weights, name, mixed(weights.tensor(name).double(), matrix, axis))


def _absorbed_gain(weights: Weights, read: ReadNorm) -> Tensor:
    """What the layers behind a norm absorb, which the norm no longer multiplies by: its gain, or one."""
    if read.norm.gain is None or not read.folded:
        return torch.ones(1, dtype=torch.float64, device=device_of(weights.model))
    stored = weights.tensor(read.norm.gain)
    gain = stored.double().reshape(-1) + read.norm.offset
    _set(weights, read.norm.gain, torch.full_like(stored, 1 - read.norm.offset))
    return gain


def _move_shift(weights: Weights, read: ReadNorm, gain: Tensor, matrix: Tensor) -> None:
    """Let the biases behind a norm absorb its shift where they can; else it is turned as the stream is."""
    if read.norm.bias is None:
        return
    shift = weights.tensor(read.norm.bias).double()
    if not read.shift_folded:
        _set(weights, read.norm.bias, mixed(shift / gain, matrix, -1))
        return
    for layer in read.layers:
        name = weights.layers[layer].bias
        assert name is not None, "checked when the stream was found"
        _set(weights, name, weights.tensor(name).double() + weights[layer].double() @ shift)
    _set(weights, read.norm.bias, torch.zeros_like(shift))


def _set(weights: Weights, name: str, value: Tensor) -> None:
    """Give a stored tensor this value; one in half precision becomes float32."""
    own = weights.tensor(name)
    if is_half(own):
        own.data = own.data.float()
    own.copy_(value)


def propose(setting: Setting) -> Proposal:
    """The streams that can be turned."""
    norms, reasons = normalizations(setting.ready)
    streams, others = residual_streams(setting.ready, norms)
    return Proposal(tuple(StreamRotation(stream, setting.seed) for stream in streams), reasons | others)


def redo(setting: Setting, records: Sequence[Mapping[str, Any]]) -> tuple[StreamRotation, ...]:
    """The rotations that a plan records. Raises InvalidRequest for a stream that the model does not have."""
    norms, _ = normalizations(setting.ready)
    streams = {stream.name: stream for stream in residual_streams(setting.ready, norms)[0]}
    places = recorded(records, streams, "turns the residual stream")
    return tuple(StreamRotation(place, record["seed"]) for place, record in zip(places, records, strict=True))


TRANSFORMS[NAME] = Transform(propose, redo)
