"""Folding BatchNorm into the convolution before it, so that the weight that is quantized is the one that runs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from quantkit.program.layers import bias_of, weight_of
from quantkit.program.trace import Op, Trace

_FOLDABLE: dict[str, type[nn.Module]] = {
    "linear": nn.Linear,
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
}


def foldable_pairs(model: nn.Module, trace: Trace) -> list[tuple[str, str]]:
    """(layer, BatchNorm) names where every output of the layer goes only to that BatchNorm and it reads nothing
    else.
    """
    norms = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
    uses: dict[str, list[Op]] = {}
    for op in trace.ops:
        if op.key.op == "batch_norm" and op.key.scope in norms:
            uses.setdefault(op.key.scope, []).append(op)
    pairs = []
    for name, calls in trace.calls.items():
        made = {call.output for call in calls}
        norm = next((n for n, ops in uses.items() if {op.inputs[0] for op in ops} == made), None)
        if norm is None or not _only_normalizes(norms[norm]) or not _only_adds_its_bias(model, trace, name):
            continue
        if trace.kinds[name] == "linear" and any(len(trace.shape[value]) != 2 for value in made):
            continue  # BatchNorm's channels are dimension 1, a Linear's are the last
        own = _read_only_by(trace, name, [trace.makers[v] for v in made]) and _read_only_by(trace, norm, uses[norm])
        if own and all(len(trace.consumers[value]) == 1 for value in made) and not made & set(trace.outputs):
            pairs.append((name, norm))
    return pairs


def _only_normalizes(norm: nn.Module) -> bool:
    """True for a BatchNorm that its statistics describe: one without code or hooks of the user's."""
    plain = type(norm).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    return plain and norm.running_mean is not None and not norm._forward_hooks and not norm._forward_pre_hooks


def _only_adds_its_bias(model: nn.Module, trace: Trace, name: str) -> bool:
    """True for a layer whose calls add the bias it is given, also in a class of the user's that passes its bias on."""
    kind = _FOLDABLE.get(trace.kinds[name])
    if kind is None:
        return False
    if type(model.get_submodule(name)).forward is kind.forward:
        return True
    bias = trace.stored.get(f"{name}.bias")
    return all(bias in trace.makers[call.output].inputs for call in trace.calls[name])


def _read_only_by(trace: Trace, module: str, ops: Iterable[Op]) -> bool:
    """True when no other call reads the parameters and buffers of ``module``."""
    keys = {op.key for op in ops}
    state = [value for name, value in trace.stored.items() if name.rpartition(".")[0] == module]
    return all(op.key in keys for value in state for op in trace.consumers.get(value, ()))


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
    """Put an Identity in the place of the module of this name, under all its names."""
    replaced, identity = model.get_submodule(name), nn.Identity()
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module is replaced:
                setattr(parent, child, identity)
