"""Repeated blocks of a network, found by structure: what rankings of whole blocks rank.

A block is a member of a list of at least two modules of one class, holds layers that are studied, and returns a tensor
of the shape it was given (the residual stream). Of nested ones the outermost counts. A sublayer is a direct child of a
block that holds such layers and returns that shape too: what is added to the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from quantkit.errors import InvalidRequest
from quantkit.program.intercept import tensors_of
from quantkit.sensitivity.measure import Perturbation, Scores, Subject

Watch = Callable[[str, Tensor, Tensor], "Tensor | None"]


@dataclass(frozen=True)
class Block:
    """A block's name, the studied layers inside it, and its sublayers with theirs."""

    name: str
    layers: tuple[str, ...]
    sublayers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def layers_of(perturbations: Iterable[Perturbation]) -> list[str]:
    """The layers whose weights are perturbed, in order."""
    return list(dict.fromkeys(p.owner for p in perturbations if not p.at_site))


def find_blocks(subject: Subject, layers: Sequence[str]) -> list[Block]:
    """The blocks of a subject's model, in order; one forward of its first batch."""
    modules = dict(subject.model.named_modules())
    candidates = [name for name in modules if _is_repeated(name, modules, layers)]
    inner = [f"{name}.{child}" for name in candidates for child, _ in modules[name].named_children()]
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}

    def see(name: str, entering: Tensor, leaving: Tensor) -> None:
        shapes.setdefault(name, (entering.shape, leaving.shape))

    with watched(subject.model, [*candidates, *inner], see):
        next(replace(subject, batches=subject.batches[:1]).float_outputs())
    keeping = [name for name in candidates if name in shapes and shapes[name][0] == shapes[name][1]]
    outermost = [n for n in keeping if not any(n.startswith(f"{other}.") for other in keeping)]
    return [
        Block(
            name,
            tuple(_inside(name, layers)),
            {
                child: tuple(_inside(child, layers))
                for child in inner
                if child.rpartition(".")[0] == name
                and _inside(child, layers)
                and child in shapes
                and shapes[child][1] == shapes[name][0]
            },
        )
        for name in outermost
    ]


def _inside(name: str, layers: Iterable[str]) -> list[str]:
    return [layer for layer in layers if layer == name or layer.startswith(f"{name}.")]


def _is_repeated(name: str, modules: Mapping[str, nn.Module], layers: Sequence[str]) -> bool:
    parent = modules[name.rpartition(".")[0]] if name else None
    if not isinstance(parent, nn.ModuleList | nn.Sequential) or name in layers or not _inside(name, layers):
        return False
    return sum(type(sibling) is type(modules[name]) for sibling in parent.children()) >= 2


def require_blocks(subject: Subject, layers: Sequence[str], name: str) -> list[Block]:
    """The blocks of the model; raises InvalidRequest where it has none."""
    blocks = find_blocks(subject, layers)
    if not blocks:
        raise InvalidRequest(
            f"sensitivity={name!r} ranks the blocks of a network that all read and write a stream of one shape, as "
            "transformers' do; this model has no such blocks. Choose 'gram' or another estimator of damage."
        )
    return blocks


@contextmanager
def watched(model: nn.Module, names: Collection[str], see: Watch) -> Iterator[None]:
    """Call ``see(name, entering, leaving)`` with the first floating-point tensor a module reads and the first it
    returns; a tensor that ``see`` returns takes the place of the latter. Hooks are removed on the way out.
    """
    hooks = []
    entered: dict[str, list[Tensor | None]] = {name: [] for name in names}
    for name in names:

        def before(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            entering = next(filter(_is_float, tensors_of((args, kwargs))), None)
            entered[name].append(None if entering is None else entering.clone())  # the module may add to it in place

        def after(_: nn.Module, args: Any, kwargs: Any, result: Any, name: str = name) -> Any:
            entering = entered[name].pop()
            leaves, spec = tree_flatten(result)
            place = next((i for i, leaf in enumerate(leaves) if _is_float(leaf)), None)
            if place is None or entering is None:
                return None
            new = see(name, entering, leaves[place])
            return None if new is None else tree_unflatten([*leaves[:place], new, *leaves[place + 1 :]], spec)

        module = model.get_submodule(name)
        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def ranking(
    subject: Subject, perturbations: Sequence[Perturbation], importance: Mapping[str, float], notes: Mapping[str, Any]
) -> Scores:
    """Scores that only rank: every format of a layer gets the layer's importance, a site that of the most important
    layer that reads it (the least of all where none does).
    """
    least = min(importance.values(), default=0.0)

    def of(p: Perturbation) -> float:
        if not p.at_site:
            return importance[p.owner]
        return max((importance[c] for c in subject.sites[p.owner].consumers if c in importance), default=least)

    values = np.array([of(p) for p in perturbations])
    return Scores(values, np.zeros(len(values)), notes=dict(notes) | {"ranking": True}, ranking=True)
