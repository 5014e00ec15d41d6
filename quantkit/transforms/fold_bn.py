"""Folding BatchNorm into the convolution before it, so that the weight that is quantized is the one that runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from quantkit.program.arguments import Ref, SizeRef, replaced
from quantkit.program.halves import widened
from quantkit.program.program import Program, Step

_FOLDABLE: dict[str, type[nn.Module]] = {
    "linear": nn.Linear,
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
}


def foldable_pairs(model: nn.Module, program: Program) -> list[tuple[str, str]]:
    """(layer, BatchNorm) names where every output of the layer goes only to that BatchNorm and it reads nothing
    else.
    """
    norms = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
    uses: dict[str, list[Step]] = {}
    for op in program.steps:
        if op.key.op == "batch_norm" and op.key.scope in norms:
            uses.setdefault(op.key.scope, []).append(op)
    pairs = []
    for name, calls in program.calls.items():
        made = {call.output for call in calls}
        norm = next((n for n, ops in uses.items() if {op.inputs[0] for op in ops} == made), None)
        if norm is None or not _only_normalizes(norms[norm]) or not _only_adds_its_bias(model, program, name):
            continue
        if program.kinds[name] == "linear" and any(len(program.shape[value]) != 2 for value in made):
            continue  # BatchNorm's channels are dimension 1, a Linear's are the last
        own = _read_only_by(program, name, [program.makers[v] for v in made]) and _read_only_by(
            program, norm, uses[norm]
        )
        if own and all(len(program.consumers[value]) == 1 for value in made) and not made & set(program.outputs):
            pairs.append((name, norm))
    return pairs


def _only_normalizes(norm: nn.Module) -> bool:
    """True for a BatchNorm that its statistics describe: one without code or hooks of the user's."""
    plain = type(norm).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    return plain and norm.running_mean is not None and not norm._forward_hooks and not norm._forward_pre_hooks


def _only_adds_its_bias(model: nn.Module, program: Program, name: str) -> bool:
    """True for a layer whose calls add the bias it is given, also in a class of the user's that passes its bias on."""
    kind, weight = _FOLDABLE.get(program.kinds[name]), program.weights[name]
    if kind is None or weight.parameter != f"{name}.weight" or weight.region is not None:
        return False
    if not isinstance(model.get_submodule(name), kind):
        return False
    if type(model.get_submodule(name)).forward is kind.forward:
        return True
    bias = program.stored.get(f"{name}.bias")
    return all(bias in program.makers[call.output].inputs for call in program.calls[name])


def _read_only_by(program: Program, module: str, ops: Iterable[Step]) -> bool:
    """True when no other call reads the parameters and buffers of ``module``."""
    keys = {op.key for op in ops}
    state = [value for name, value in program.stored.items() if name.rpartition(".")[0] == module]
    return all(op.key in keys for value in state for op in program.consumers.get(value, ()))


def fold(model: nn.Module, pairs: Iterable[tuple[str, str]]) -> None:
    """Fold each BatchNorm into its layer, in place; the BatchNorm becomes an Identity. Computed in float64, stored in
    at least float32.
    """
    for name, norm_name in pairs:
        layer, norm = model.get_submodule(name), model.get_submodule(norm_name)
        weight, bias = layer.get_parameter("weight"), layer._parameters["bias"]
        gain, shift = _affine_of(norm)
        moved = shift if bias is None else shift + gain * bias.double()
        dtype = widened(weight.dtype)
        layer.weight = nn.Parameter(gain.reshape(-1, *[1] * (weight.dim() - 1)).mul(weight).to(dtype), False)
        layer.bias = nn.Parameter(moved.to(dtype), False)
        layer.requires_grad_(weight.requires_grad)
        replace_by_identity(model, norm_name)


def without_norms(program: Program, pairs: Sequence[tuple[str, str]]) -> Program | None:
    """The program of the model that ``fold`` left, without running it; None where a layer's call does not show where
    its bias goes.
    """
    norms = {norm for _, norm in pairs}
    layers = {call.key: name for name, _ in pairs for call in program.calls[name]}
    gone = {s.outputs[0]: s.inputs[0] for s in program.steps if s.key.scope in norms and s.key.op == "batch_norm"}
    stored = {name: number for name, number in program.stored.items() if name.rpartition(".")[0] not in norms}
    biases = {name: stored.get(f"{name}.bias", -2 - i) for i, (name, _) in enumerate(pairs)}
    stored |= {f"{name}.bias": number for name, number in biases.items()}

    steps = []
    for step in program.steps:
        if gone.keys() & set(step.outputs):
            continue
        if step.key in layers:
            if len(step.args) < 3:
                return None
            args = (*step.args[:2], Ref(biases[layers[step.key]]), *step.args[3:])
            step = replace(step, args=args, inputs=(*step.inputs[:2], biases[layers[step.key]]))
        args, kwargs = replaced((step.args, step.kwargs), lambda leaf: _moved(leaf, gone))
        steps.append(replace(step, args=args, kwargs=kwargs, inputs=tuple(gone.get(n, n) for n in step.inputs)))

    shape = program.shape | {n: program.shape[program.calls[name][0].output][1:2] for name, n in biases.items()}
    weights = program.weights | {name: replace(program.weights[name], bias=f"{name}.bias") for name in biases}
    producer = {number: key for number, key in program.producer.items() if number not in gone}
    calls = {
        name: tuple(replace(call, input=gone.get(call.input, call.input)) for call in calls)
        for name, calls in program.calls.items()
    }
    return replace(
        program, steps=tuple(steps), stored=stored, shape=shape, weights=weights, producer=producer, calls=calls,
        floating=program.floating | set(biases.values()),
    )  # fmt: skip


def _moved(leaf: object, gone: dict[int, int]) -> object:
    """A reference to what a norm made, as one to what it read; sizes are those of what it read too."""
    if isinstance(leaf, Ref):
        return Ref(gone.get(leaf.number, leaf.number))
    return leaf.moved(gone) if isinstance(leaf, SizeRef) else leaf


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
        if layer.bias is None:
            weight = layer.weight
            layer.bias = nn.Parameter(torch.zeros(len(weight), dtype=widened(weight.dtype), device=weight.device))
        replace_by_identity(model, norm_name)


def replace_by_identity(model: nn.Module, name: str) -> None:
    """Put an Identity in the place of the module of this name, under all its names."""
    replaced, identity = model.get_submodule(name), nn.Identity()
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module is replaced:
                setattr(parent, child, identity)
