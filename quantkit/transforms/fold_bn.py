"""Folding BatchNorm into the convolution before it, so that the weight that is quantized is the one that runs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from quantkit.graph.trace import Trace

_FOLDABLE = ("linear", "conv1d", "conv2d", "conv3d")


def foldable_pairs(model: nn.Module, trace: Trace) -> list[tuple[str, str]]:
    """(layer, BatchNorm) names where every output of the layer goes only to that BatchNorm and it reads nothing else."""
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
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
        dtype = layer.weight.dtype
        statistics = [None if t is None else t.double() for t in (norm.running_mean, norm.running_var)]
        affine = [None if t is None else t.detach().double() for t in (norm.weight, norm.bias)]
        bias = None if layer.bias is None else layer.bias.detach().double()
        fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
        weight, bias = fuse(layer.weight.detach().double(), bias, *statistics, norm.eps, *affine)
        layer.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=layer.weight.requires_grad)
        layer.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=layer.weight.requires_grad)
        replace_by_identity(model, norm_name)


def shape_like_folded(model: nn.Module, pairs: Iterable[tuple[str, str]]) -> None:
    """Give a float model the modules ``fold`` would leave, with meaningless biases, ready to receive folded weights."""
    for name, norm_name in pairs:
        layer = model.get_submodule(name)
        if layer.bias is None:
            channels = layer.weight.shape[0]
            layer.bias = nn.Parameter(torch.zeros(channels, dtype=layer.weight.dtype, device=layer.weight.device))
        replace_by_identity(model, norm_name)


def replace_by_identity(model: nn.Module, name: str) -> None:
    """Put an Identity in the place of the module of this name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
