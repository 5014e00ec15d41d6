"""What the zoo's entries are made of: the record, its registry, inputs of any size, and counts of weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class BatchBuilder(Protocol):
    """(args, kwargs) of one forward; ``length`` counts tokens, or pixels along an image's side."""

    def __call__(self, samples: int, length: int | None = None, seed: int = 0) -> tuple[tuple, dict[str, Any]]: ...


def floating_outputs(result: Any) -> list[Tensor]:
    """Floating-point tensors anywhere in a forward's result, in its order."""
    if isinstance(result, Tensor):
        return [result] if result.is_floating_point() else []
    if isinstance(result, Mapping):
        parts = list(result.values())
    elif is_dataclass(result):
        parts = [getattr(result, field.name) for field in fields(result)]
    else:
        parts = list(result) if isinstance(result, list | tuple) else []
    return [tensor for part in parts for tensor in floating_outputs(part)]


@dataclass(frozen=True)
class Architecture:
    """A tiny network and its inputs.

    ``build`` gives the model in eval mode, the same numbers at every call. ``lengths`` are the sizes that ``batch``
    and the model accept besides any number of samples, the default first; empty where only one size fits. ``blocks``
    counts encoder and decoder blocks. ``added_tables`` names the parameters of two or more dimensions that take part
    in no product: added, multiplied element by element or concatenated. Parameters that a weight is computed from
    (gains of weight norm, both factors of LoRA) belong to that weight and are not among them.
    ``control_flow`` names what decides the path that the model's Python code takes, of "samples", "length" and
    "values": one record of its operations does not describe a run where that differs.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: BatchBuilder
    lengths: tuple[int, ...] = ()
    blocks: int = 0
    added_tables: tuple[str, ...] = ()
    control_flow: tuple[str, ...] = ()
    output: Callable[[Any], list[Tensor]] = floating_outputs


ARCHITECTURES: dict[str, Architecture] = {}


def architecture(batch: BatchBuilder, **details: Any) -> Callable[[Callable[[], nn.Module]], Callable]:
    """Register a builder under its function's name; ``details`` are the record's other fields."""

    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        def seeded() -> nn.Module:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return build().eval()

        ARCHITECTURES[build.__name__] = Architecture(build.__name__, seeded, batch, **details)
        return seeded

    return register


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randint(high: int, *shape: int, seed: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def sequences(width: int, default: int) -> BatchBuilder:
    """Samples of ``length`` vectors."""

    def batch(samples: int, length: int | None = None, seed: int = 0) -> tuple[tuple, dict[str, Any]]:
        return (randn(samples, length or default, width, seed=seed),), {}

    return batch


def vectors(width: int) -> BatchBuilder:
    """Samples of one vector."""

    def batch(samples: int, length: int | None = None, seed: int = 0) -> tuple[tuple, dict[str, Any]]:
        return (randn(samples, width, seed=seed),), {}

    return batch


def images(channels: int, default: int, dimensions: int = 2) -> BatchBuilder:
    """Samples of square images; of signals or volumes with one or three ``dimensions``."""

    def batch(samples: int, length: int | None = None, seed: int = 0) -> tuple[tuple, dict[str, Any]]:
        return (randn(samples, channels, *[length or default] * dimensions, seed=seed),), {}

    return batch


def token_ids(vocabulary: int, default: int) -> BatchBuilder:
    """Samples of ``length`` token numbers."""

    def batch(samples: int, length: int | None = None, seed: int = 0) -> tuple[tuple, dict[str, Any]]:
        return (randint(vocabulary, samples, length or default, seed=seed),), {}

    return batch


def padding_mask(samples: int, length: int) -> Tensor:
    """(samples, length), False under the padding at the end: one place in the first sample, two in the second..."""
    kept = length - 1 - torch.arange(samples) % (length - 1)
    return torch.arange(length) < kept[:, None]


def float_elements(model: nn.Module, leave_out: Collection[str] = ()) -> int:
    """Elements of all floating-point parameters of two or more dimensions, ties once, without those named.

    Two parameters over the same memory are a tie.
    """
    sizes: dict[int, int] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_floating_point() and parameter.dim() >= 2 and name not in leave_out:
            sizes[parameter.data_ptr()] = max(parameter.numel(), sizes.get(parameter.data_ptr(), 0))
    return sum(sizes.values())
