"""Where parameters come from: a module, or files that are read as they are needed.

What computes a part of a program asks for the tensors that the part reads, by name, and for no others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from quantkit.errors import CorruptFile, InvalidRequest, did_you_mean

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class WeightSource(Protocol):
    """Gives tensors by name. They may be the stored ones themselves: nobody writes to them."""

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The parameters and buffers of these names, in the type they are stored in."""
        ...


@dataclass(frozen=True)
class ModuleSource:
    """The parameters and buffers of a module, under all their names."""

    model: nn.Module

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        found = {}
        for name in names:
            owner, _, attribute = name.rpartition(".")
            tensor = getattr(self.model.get_submodule(owner), attribute)
            assert isinstance(tensor, Tensor), f"{name} is a parameter or buffer"
            found[name] = tensor.detach()
        return found


@dataclass(frozen=True)
class ShardedSource:
    """The tensors of a checkpoint: ``model.safetensors``, or shards that ``model.safetensors.index.json`` lists."""

    folder: Path

    @cached_property
    def files(self) -> dict[str, str]:
        """Name -> the file that holds the tensor."""
        index = self.folder / INDEX
        try:
            if not index.exists():
                with safe_open(str(self.folder / SINGLE), framework="pt") as file:
                    return dict.fromkeys(file.keys(), SINGLE)
            return dict(json.loads(index.read_text())["weight_map"])
        except OSError as error:
            raise InvalidRequest(
                f"{str(self.folder)!r} holds no checkpoint ({error.strerror or error}): {SINGLE} or {INDEX} is needed."
            ) from error
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CorruptFile(f"The list of tensors in {str(self.folder)!r} cannot be read ({error}).") from error

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Reads each shard that holds some of the tensors once, and of it only these. Raises InvalidRequest for a name
        that no shard holds, CorruptFile for a shard that is missing or damaged.
        """
        wanted: dict[str, list[str]] = {}
        for name in names:
            if name not in self.files:
                hint = did_you_mean(name, list(self.files))
                raise InvalidRequest(f"The checkpoint {str(self.folder)!r} has no tensor {name!r}.{hint}")
            wanted.setdefault(self.files[name], []).append(name)
        found: dict[str, Tensor] = {}
        for shard, held in wanted.items():
            try:
                with safe_open(str(self.folder / shard), framework="pt") as file:
                    found |= {name: file.get_tensor(name) for name in held}
            except (OSError, SafetensorError) as error:
                raise CorruptFile(
                    f"The shard {shard!r} of {str(self.folder)!r} is missing or damaged ({error}). Download it again."
                ) from error
        return found
