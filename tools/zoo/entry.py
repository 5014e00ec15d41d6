"""What the zoo's entries are made of: the record, its registry and inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

SEED = 0
Inputs = Callable[[int, int], Any]  # (samples, seed) -> a tensor, a tuple of arguments or a dict of keywords


@dataclass(frozen=True)
class Entry:
    """A network with random weights. ``build`` makes it, ``inputs`` one batch that it takes; ``options`` are those of
    ``quantize``, where the defaults would take minutes.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    options: dict[str, Any]

    def model(self) -> nn.Module:
        """The network in eval mode, the same numbers at every call."""
        torch.manual_seed(SEED)
        model = self.build().eval()
        with torch.no_grad():
            _show_every_part(model)
            _settle_statistics(model, self.inputs(8, SEED + 1))
        return model


ZOO: dict[str, Entry] = {}


def add(family: str, name: str, build: Callable[[], nn.Module], inputs: Inputs, **options: Any) -> None:
    """Register a network."""
    if name in ZOO:
        raise ValueError(f"two networks are called {name}")
    ZOO[name] = Entry(name, family, build, inputs, options)


def _show_every_part(model: nn.Module) -> None:
    """Move parameters that start as one number everywhere: a gain of nothing behind a branch would hide the branch, a
    head of zeros all of the network.
    """
    for parameter in model.parameters():
        if (
            parameter.is_floating_point()
            and parameter.numel() > 1
            and bool((parameter == parameter.flatten()[0]).all())
        ):
            parameter.add_(torch.randn_like(parameter) * 0.1)


def _settle_statistics(model: nn.Module, item: Any) -> None:
    """Give BatchNorms the statistics of a batch, without which activations of a deep network grow or vanish."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # the mean over all batches
        norm.reset_running_stats()
        norm.train()
    run(model, item)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def run(model: nn.Module, item: Any) -> Any:
    """One forward of a batch in any of the three forms."""
    if isinstance(item, dict):
        return model(**item)
    return model(*item) if isinstance(item, tuple) else model(item)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randint(high: int, *shape: int, seed: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def noise(*shape: int) -> Inputs:
    """Samples of normal noise of a shape."""
    return lambda samples, seed: randn(samples, *shape, seed=seed)


def named(name: str, inputs: Inputs) -> Inputs:
    """The same inputs as a keyword."""
    return lambda samples, seed: {name: inputs(samples, seed)}
