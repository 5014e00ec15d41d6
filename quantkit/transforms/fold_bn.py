"""Folding BatchNorm into the convolution before it, so that the weight that is quantized is the one that runs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from quantkit.graph.layers import bias_of, weight_of
from quantkit.graph.trace import Trace

_FOLDABLE = ("linear", "conv1d", "conv2d", "conv3d")


def foldable_pairs(model: nn.Module, trace: Trace) -> list[tuple[str, str]]:
    """(layer, BatchNorm) names where every output of the layer goes only to that BatchNorm and it reads nothing
    else.
    """
    norms = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
    reads: dict[str, set[int]] = {}
    for op in trace.ops:
        if op.key.op == "batch_norm" and op.key.scope in norms:
            reads.setdefault(op.key.scope, set()).add(op.inputs[0])
    pairs = []
    for name, calls in trace.calls.items():
        made = {call.output for call in calls}
        norm = next((n for n, values in reads.items() if values == made), None)
        if norm is None or trace.kinds[name] not in _FOLDABLE or norms[norm].running_mean is None:
            continue
        if trace.kinds[name] == "linear" and any(len(trace.shape[value]) != 2 for value in made):
            continue  # BatchNorm's channels are dimension 1, a Linear's are the last
        if all(len(trace.consumers.get(value, ())) == 1 for value in made) and not made & set(trace.outputs):
            pairs.append((name, norm))
    return pairs


def fold(model: nn.Module, pairs: Iterable[tuple[str, str]]) -> None:
    """Fold each BatchNorm into its layer, in place; the BatchNorm becomes an Identity. Computed in float64."""
    for name, norm_name in pairs:
        layer, norm = model.get_submodule(name), model.get_submodule(norm_name)
        weight, bias = weight_of(model, name), bias_of(model, name)
        gain, shift = _affine_of(norm)
        moved = shift if bias is None else shift + gain * bias.double()
        layer.weight = nn.Parameter(gain.reshape(-1, *[1] * (weight.dim() - 1)).mul(weight).to(weight), False)
        layer.bias = nn.Parameter(moved.to(weight), False)
        layer.requires_grad_(weight.requires_grad)
        replace_by_identity(model, norm_name)


def _affine_of(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(gain, shift), float64, of what a BatchNorm computes from its running statistics: gain x + shift."""
    assert isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None
    gain = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        gain = gain * norm.weight.detach()
    shift = -gain * norm.running_mean
    return gain, shift if norm.bias is None else shift + norm.bias.detach()


def shape_like_folded(model: nn.Module, pairs: Iterable[tuple[str, str]]) -> None:
    """Give a float model the modules ``fold`` would leave, biases zero, ready to receive folded weights."""
    for name, norm_name in pairs:
        layer = model.get_submodule(name)
        if bias_of(model, name) is None:
            weight = weight_of(model, name)
            layer.bias = nn.Parameter(torch.zeros(len(weight), dtype=weight.dtype, device=weight.device))
        replace_by_identity(model, norm_name)


def replace_by_identity(model: nn.Module, name: str) -> None:
    """Put an Identity in the place of the module of this name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
