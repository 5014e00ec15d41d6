"""GPTQ as the paper and its authors' code have it, on a decoder of transformers, without anything of quantkit.

What quantkit's own is compared with, in time (``tools/study_gptq.py``) and in quality: ranges from the extremes of
each group, static groups, columns most active first, a block of the model at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Caught(Exception):
    """The first block has been reached."""


@torch.no_grad()
def plain_gptq(model: nn.Module, batches: Sequence[Tensor], bits: int, group: int) -> None:
    """Round every linear layer of a Llama-like ``model`` in place, given token ids in ``batches``."""
    calls = [_inputs_of(model, model.model.layers[0], ids) for ids in batches]
    for block in model.model.layers:
        _round_layers(block, calls, bits, group)
        calls = [((block(*args, **kwargs),), kwargs) for args, kwargs in calls]
    head = nn.Sequential(model.model.norm, model.lm_head)
    _round_layers(head, [(args, {}) for args, _ in calls], bits, group)


def _inputs_of(model: nn.Module, block: nn.Module, ids: Tensor) -> Call:
    caught: list[Call] = []

    def catch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args, kwargs))
        raise _Caught

    handle = block.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        model(ids, use_cache=False)
    except _Caught:
        handle.remove()
    return caught[0]


def _round_layers(block: nn.Module, calls: Sequence[Call], bits: int, group: int) -> None:
    """Round the linear layers of a block on the inputs that they get in it, one pass for all of them."""
    layers = [module for module in block.modules() if isinstance(module, nn.Linear)]
    hessians = {layer: torch.zeros(layer.in_features, layer.in_features) for layer in layers}

    def add(layer: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].flatten(0, -2)
        hessians[layer].addmm_(x.T, x)

    handles = [layer.register_forward_pre_hook(add) for layer in layers]
    for args, kwargs in calls:
        block(*args, **kwargs)
    for handle in handles:
        handle.remove()
    for layer, hessian in hessians.items():
        layer.weight.copy_(rounded(layer.weight, hessian, bits, group))


def rounded(weight: Tensor, hessian: Tensor, bits: int, group: int, damping: float = 0.01, span: int = 128) -> Tensor:
    """``weight`` (O, K) on the grid of its groups, rounded by algorithm 1 of arXiv 2210.17323 in spans of columns."""
    left, hessian, top = weight.clone(), hessian.clone(), 2**bits - 1
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    left[:, dead] = 0
    grouped = left.unflatten(1, (-1, group))
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    scale = ((high - low) / top).clamp(min=1e-10)
    scale, zero = (x.repeat_interleave(group, 1) for x in (scale, torch.round(-low / scale)))
    order = hessian.diagonal().argsort(descending=True)
    left, scale, zero, hessian = left[:, order], scale[:, order], zero[:, order], hessian[order][:, order]
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    found = torch.empty_like(left)
    for start in range(0, left.shape[1], span):
        stop = min(start + span, left.shape[1])
        errors = torch.zeros_like(left[:, start:stop])
        for j in range(start, stop):
            codes = (torch.round(left[:, j] / scale[:, j]) + zero[:, j]).clamp(0, top)
            found[:, j] = (codes - zero[:, j]) * scale[:, j]
            errors[:, j - start] = (left[:, j] - found[:, j]) / inverse[j, j]
            left[:, j:stop] -= torch.outer(errors[:, j - start], inverse[j, j:stop])
        left[:, stop:] -= errors @ inverse[start:stop, stop:]
    return found[:, order.argsort()]
