"""Ranges for each channel behind a LayerNorm, turned into one range for all channels without changing a code
(RepQ-ViT, Li et al., arXiv 2212.08254, section 3.2; RepQuant, arXiv 2402.05628).

With scales s and zero points z of the channels, one scale S and zero point Z for all, r = s / S and d = s (z - Z), the
norm gets the gain g / r and the shift (h + d) / r, every layer that reads it the weight W diag(r) and the bias
b - W d. The norm then makes (x + d) / r, whose code round(. / S) + Z is round(x / s) + z, and the layers make what
they made before. Z is rounded and clamped to the codes: the authors' implementation leaves it fractional, which is a
grid of one level more than the bits hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantkit.numbers.uniform import SiteRange
from quantkit.program.arguments import SizeRef, SliceRef
from quantkit.program.codes import moves_values
from quantkit.program.layers import Weights
from quantkit.program.program import Program, Step
from quantkit.program.sites import sites_by_maker
from quantkit.ranges.channels import ChannelRanges
from quantkit.transforms.prepare import Prepared


@dataclass(frozen=True)
class Norm:
    """A LayerNorm whose readers can all be rewritten: its module, the site it makes, the layers that read it."""

    name: str
    site: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Rewrite:
    """What changes at a norm: ``ratio`` r and ``shift`` d (channels,), float64, and the site's range afterwards."""

    norm: Norm
    ratio: Tensor
    shift: Tensor
    found: SiteRange

    @classmethod
    def of(cls, norm: Norm, ranges: ChannelRanges) -> Rewrite:
        """The rewrite after which one range stands for ``ranges``."""
        scale, zero = ranges.scale.double(), ranges.zero_point.double()
        common = float(scale.mean().float())  # runtimes hold scales in float32
        middle = int(zero.mean().round().clamp(0, ranges.high))
        return cls(norm, scale / common, scale * (zero - middle), SiteRange(common, middle, ranges.bits))


def rewritable_norms(ready: Prepared) -> tuple[list[Norm], dict[str, str]]:
    """The LayerNorms that can be rewritten, in execution order, and for the others, by name, why not."""
    sites = sites_by_maker(ready.program, ready.sites)
    found, reasons = [], {}
    for op in ready.program.steps:
        if op.key.op != "layer_norm" or op.key not in sites:
            continue
        name = op.key.scope
        try:
            layers = _readers(ready, op)
        except _CannotRewrite as reason:
            reasons[name] = str(reason)
            continue
        found.append(Norm(name, sites[op.key], layers))
    return found, reasons


class _CannotRewrite(Exception):
    """The reason why a norm stays as it is."""


def _readers(ready: Prepared, op: Step) -> tuple[str, ...]:
    """The layers that read what a norm makes; raises _CannotRewrite."""
    module, program = ready.model.get_submodule(op.key.scope), ready.program
    if not isinstance(module, nn.LayerNorm) or module.bias is None or len(module.normalized_shape) != 1:
        raise _CannotRewrite("it has no gain and shift for each channel")
    for kind in ("weight", "bias"):
        if others := [o.key for o in program.consumers[program.stored[f"{op.key.scope}.{kind}"]] if o.key != op.key]:
            raise _CannotRewrite(f"its {kind} is also read by {others[0]}")
    layers = tuple(dict.fromkeys(_layers_behind(ready, op.outputs[0], op.outputs[0])))
    if not layers:
        raise _CannotRewrite("no layer reads it")
    return layers


def _layers_behind(ready: Prepared, value: int, made: int) -> Iterator[str]:
    """The layers that read ``value``, which holds channels of ``made``; raises _CannotRewrite for other readers."""
    program = ready.program
    if value in program.outputs:
        raise _CannotRewrite("the model returns it")
    for reader in program.consumers.get(value, ()):
        layer = program.layer_of.get(reader.key)
        if layer is not None and layer in ready.quantizable:
            yield _checked(ready, layer, value)
        elif _keeps_channels(program, reader, made):
            yield from _layers_behind(ready, reader.outputs[0], made)
        else:
            raise _CannotRewrite(f"{reader.key} reads it, which is no quantized linear layer")


def _keeps_channels(program: Program, op: Step, made: int) -> bool:
    """True for operations that pick or regroup tokens and leave the channels in the last dimension in order."""
    if not moves_values(op) or len(op.inputs) != 1 or len(op.outputs) != 1:
        return False
    if op.key.op == "getitem":
        index = op.arguments[0] if op.arguments else None
        parts = index if isinstance(index, tuple) else (index,)
        whole = len(parts) < len(program.shape[op.inputs[0]])  # the last dimension is not indexed
        return whole and all(isinstance(part, int | slice | SizeRef | SliceRef) for part in parts)
    regroups = op.key.op in ("reshape", "view", "flatten", "unflatten", "contiguous", "clone", "detach")
    return regroups and program.shape[op.outputs[0]][-1] == program.shape[made][-1]


def _checked(ready: Prepared, layer: str, value: int) -> str:
    if ready.program.kinds[layer] != "linear":
        raise _CannotRewrite(f"{layer} reads it, which is no linear layer")
    if any(call.input != value for call in ready.program.calls[layer]):
        raise _CannotRewrite(f"{layer} reads other tensors too")
    if ready.weights.bias(layer) is None:
        raise _CannotRewrite(f"{layer} has no bias to take up the shift")
    return layer


@torch.no_grad()
def rewrite(weights: Weights, change: Rewrite) -> None:
    """Rewrite a norm and the layers that read it, in place; the model computes what it computed. In float64."""
    norm = weights.model.get_submodule(change.norm.name)
    assert isinstance(norm, nn.LayerNorm)
    gain, offset = norm.weight.double(), norm.bias.double()
    ratio, shift = change.ratio.to(gain), change.shift.to(gain)
    norm.weight.copy_(gain / ratio)
    norm.bias.copy_((offset + shift) / ratio)
    for name in change.norm.layers:
        weight, bias = weights[name], weights.bias(name)
        assert bias is not None, "checked when the norm was found"
        bias.copy_(bias.double() - weight.double() @ shift)
        weights.write(name, weight.double() * ratio)
