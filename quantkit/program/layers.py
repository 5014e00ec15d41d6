"""Layers: products of an activation with something that does not depend on the model's input.

The operand of a linear, convolution, transposed convolution, embedding, matrix product or recurrent step is a layer's
weight, whether it is a parameter, a slice of one (the packed projections of attention), a view (a transposed matrix,
experts held in three dimensions) or computed from parameters (a standardized or low-rank adapted weight). A layer is
named as the module that owns its weight, or as the parameter where the module owns several.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from quantkit.numbers.kinds import AnyWeight
from quantkit.program.halves import is_half, widened
from quantkit.program.intercept import OpKey, device_of

Operands = dict[OpKey, tuple[int, Tensor]]
Substitutes = dict[int, Callable[[], Tensor]]

MODULES: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
    nn.Embedding: "embedding",
    nn.Bilinear: "bilinear",
}


@dataclass(frozen=True)
class LayerCall:
    """One run of a layer: the value it read, the one it made, its multiply-accumulates per sample, and the position of
    the value it read among the tensors that the call reads.
    """

    key: OpKey
    input: int
    output: int
    macs: int
    source: int = 0


@dataclass(frozen=True)
class Region:
    """A view of a parameter: sizes, strides and offset in elements, as ``torch.as_strided`` takes them."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, parameter: Tensor) -> Tensor:
        return parameter.as_strided(self.size, self.stride, parameter.storage_offset() + self.offset)


@dataclass(frozen=True)
class LayerWeight:
    """Where a layer's weight is, and how it is read: with output channels first.

    ``shape`` is that of the weight as read. ``parameter`` names what holds it, None where it is computed from the
    parameters ``sources``; ``region`` is the part of it, None for all, and ``order`` the axes of the region, output
    channels first (several are joined), None where they are first. ``bias`` names the bias, ``groups`` are a
    convolution's. ``numbers`` are the values that a computed weight has in the program, ``at`` the calls that read it,
    with its position among the tensors they read. ``reads_constant``: what it multiplies is the same whatever the
    model is given, as coordinates are and what parameters alone make.
    """

    kind: str
    shape: tuple[int, ...]
    parameter: str | None
    region: Region | None = None
    order: tuple[int, ...] | None = None
    bias: str | None = None
    groups: int = 1
    sources: tuple[str, ...] = ()
    numbers: tuple[int, ...] = ()
    at: tuple[tuple[OpKey, int], ...] = ()
    reads_constant: bool = False

    @property
    def reads_rows(self) -> bool:
        """Whether what the layer multiplies is known row by row, so that rounding can look at it: not where there are
        several matrices, where it is on the left, looked up, the same for all inputs, or made inside a recurrent call.
        """
        rows = self.kind in ("linear", "conv1d", "conv2d", "conv3d")
        return not self.reads_constant and (rows or (self.kind == "matmul" and self.order == (1, 0)))

    @property
    def inputs_seen(self) -> bool:
        """Whether rounding can look at what the layer multiplies, inside a recurrent call too."""
        return self.reads_rows or self.kind == "recurrent"

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON takes them; of a layer whose weight is computed, where that is read, too."""
        record = asdict(self)
        record["at"] = [[asdict(key), position] for key, position in self.at]
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> LayerWeight:
        """The layer that ``to_dict`` described."""
        known = {field.name: record[field.name] for field in fields(cls) if field.name in record}
        for name in ("shape", "order", "sources", "numbers"):
            known[name] = None if known[name] is None else tuple(known[name])
        if (region := known["region"]) is not None:
            known["region"] = Region(tuple(region["size"]), tuple(region["stride"]), region["offset"])
        known["at"] = tuple((OpKey(**key), position) for key, position in known["at"])
        return cls(**known)

    def read(self, parameter: Tensor) -> Tensor:
        """The weight, of the parameter that holds it: a view where its axes allow one."""
        if self.region is None and self.order is None:
            return parameter
        return self._turned(parameter).reshape(self.shape)

    def _turned(self, parameter: Tensor) -> Tensor:
        part = parameter if self.region is None else self.region.of(parameter)
        return part if self.order is None else part.permute(self.order)

    def write(self, parameter: Tensor, value: Tensor) -> None:
        """Give the part of a parameter that the layer reads this value."""
        turned = self._turned(parameter.detach())
        turned.copy_(value.reshape(turned.shape))

    def placed(self, parameter: Tensor, value: Tensor) -> Tensor:
        """The parameter, at least float32, with this value in its place, differentiable in the value."""
        if self.region is None:
            return self.operand(value, tuple(parameter.shape))
        part = self.operand(value, self.region.size)
        return torch.as_strided_scatter(
            widened(parameter), part, self.region.size, self.region.stride, self.region.offset
        )

    def operand(self, value: Tensor, size: tuple[int, ...]) -> Tensor:
        """A value as it is read, turned back to the axes of what is read, of this size."""
        if self.order is None:
            return value.reshape(size)
        turned = value.reshape([size[axis] for axis in self.order])
        return turned.permute(sorted(range(len(size)), key=self.order.__getitem__))


def layer_kind(module: nn.Module) -> str | None:
    """The kind of a module that owns a weight to quantize, e.g. "conv2d"; None for all others, also where the weight
    is complex, empty, computed from other tensors or handed in.
    """
    kind = next((name for known, name in MODULES.items() if isinstance(module, known)), None)
    weight = module._parameters.get("weight") if kind is not None else None
    return kind if weight is not None and weight.is_floating_point() and (is_lazy(weight) or weight.numel()) else None


def module_layers(model: nn.Module) -> dict[str, LayerWeight]:
    """The layers that are known without running the model: modules of the common kinds."""
    found = {}
    for name, module in model.named_modules():
        if (kind := layer_kind(module)) is not None:
            parameter = f"{name}.weight" if name else "weight"
            bias = f"{name}.bias" if getattr(module, "bias", None) is not None else None
            groups = int(getattr(module, "groups", 1))
            found[name] = weight_at(kind, parameter, module.get_parameter("weight"), groups=groups, bias=bias)
    return found


def weight_at(kind: str, parameter: str, weight: Tensor, groups: int = 1, bias: str | None = None) -> LayerWeight:
    """The layer that reads the whole of a parameter as a module of this kind does."""
    if not kind.startswith("conv_transpose"):
        return LayerWeight(kind, tuple(weight.shape), parameter, groups=groups, bias=bias)
    inputs, outputs, *kernel = weight.shape  # (in, out / groups, ...)
    size = (groups, inputs // groups, outputs, *kernel)
    stride = (weight.stride(0) * (inputs // groups), *weight.stride())
    order, shape = (0, 2, 1, *range(3, len(size))), (groups * outputs, inputs // groups, *kernel)
    return LayerWeight(kind, shape, parameter, Region(size, stride, 0), order, bias, groups)


class Weights:
    """The weights and biases of a model's layers, by layer name. ``computed`` holds those that no parameter does."""

    def __init__(
        self, model: nn.Module, layers: Mapping[str, LayerWeight], computed: Mapping[str, Tensor] | None = None
    ) -> None:
        self.model, self.layers, self.computed = model, dict(layers), dict(computed or {})

    @classmethod
    def of_modules(cls, model: nn.Module) -> Weights:
        """The weights of the modules of the common kinds."""
        return cls(model, module_layers(model))

    def on(self, model: nn.Module) -> Weights:
        """The same of another copy of the model."""
        return Weights(
            model, self.layers, {name: x.to(device_of(model), copy=True) for name, x in self.computed.items()}
        )

    def __contains__(self, layer: str) -> bool:
        return layer in self.layers

    def __getitem__(self, layer: str) -> Tensor:
        """A layer's weight, output channels first: the parameter itself where that holds it so, and a float32 copy
        where it is stored in half precision.
        """
        weight = self.layers[layer]
        if weight.parameter is None:
            return self.computed[layer]
        found: Tensor = widened(weight.read(self.tensor(weight.parameter)))
        return found

    def stores_half(self, layer: str) -> bool:
        """Whether a layer's weight is in a parameter in half precision, which holds no dequantized codes."""
        parameter = self.layers[layer].parameter
        return parameter is not None and is_half(self.tensor(parameter))

    def stored_bytes(self, layer: str) -> int:
        """The bytes of a layer's weight in float, as it is stored."""
        weight = self.layers[layer]
        held = self.computed[layer] if weight.parameter is None else self.tensor(weight.parameter)
        return math.prod(weight.shape) * held.element_size()

    @torch.no_grad()
    def write(self, layer: str, value: Tensor) -> None:
        """Let the layer compute with this weight, output channels first; a parameter in half precision becomes
        float32.
        """
        weight = self.layers[layer]
        if weight.parameter is None:
            self.computed[layer] = value.to(self.computed[layer])
            return
        own = self.tensor(weight.parameter)
        if is_half(own):
            own.data = own.data.float()
        weight.write(own, value)

    @torch.no_grad()
    def swap(self, layer: str, value: Tensor) -> Callable[[], None]:
        """``write``, returning what undoes it; a whole parameter is exchanged, not copied."""
        weight = self.layers[layer]
        if weight.parameter is None:
            before = self.computed[layer]
            self.write(layer, value)
            return partial(self.computed.__setitem__, layer, before)
        own = self.tensor(weight.parameter)
        if is_half(own):
            undo = partial(setattr, own, "data", own.data)
            self.write(layer, value)
            return undo
        if weight.region is None and weight.order is None:
            undo = partial(setattr, own, "data", own.data)
            own.data = value.to(own)
            return undo
        before = self[layer].detach().clone()
        self.write(layer, value)
        return partial(self.write, layer, before)

    def bias(self, layer: str) -> Tensor | None:
        """A layer's bias; None where it has none of its own."""
        name = self.layers[layer].bias
        return None if name is None else self.tensor(name)

    def placed(self, layer: str, value: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a replay's state has to hold so that the layer computes with this weight."""
        weight = self.layers[layer]
        if weight.parameter is None:
            assert weight.region is not None, "a computed weight has sizes"
            device = self.computed[layer].device
            return {str(number): weight.operand(value.to(device), weight.region.size) for number in weight.numbers}
        held = state[weight.parameter]
        return {weight.parameter: weight.placed(held, value.to(held.device))}

    def operands(self, layers: Collection[str]) -> dict[OpKey, tuple[int, Tensor]]:
        """What calls of those of ``layers`` whose weights are computed read instead of computing them."""
        found: Operands = {}
        for name in layers:
            weight = self.layers[name]
            if weight.parameter is None and weight.region is not None:
                operand = weight.operand(self.computed[name], weight.region.size)
                found |= {key: (position, operand) for key, position in weight.at}
        return found

    def substitutes(self, coded: Mapping[str, AnyWeight]) -> Substitutes:
        """Of the parameters in half precision that hold weights of ``coded``, by identity, what computes their float32
        values with these codes: one at a time, when a call reads it.
        """
        held: dict[str, list[str]] = defaultdict(list)
        for name in coded:
            if self.stores_half(name):
                held[str(self.layers[name].parameter)].append(name)
        return {id(self.tensor(p)): partial(self._with_codes, p, names, coded) for p, names in held.items()}

    def _with_codes(self, parameter: str, layers: Collection[str], coded: Mapping[str, AnyWeight]) -> Tensor:
        found = self.tensor(parameter).detach()
        for name in layers:
            found = self.layers[name].placed(found, coded[name].dequantize().to(found.device))
        return found

    def inputs(self, layer: str) -> int:
        """How many inputs an output channel has: the width of the layer's Hessian."""
        return math.prod(self.layers[layer].shape[1:])

    def covered(self, layers: Collection[str]) -> list[str]:
        """The parameters that ``layers`` hold the whole of, in order."""
        held: dict[str, int] = {}
        for name in layers:
            weight = self.layers[name]
            if weight.parameter is not None:
                held[weight.parameter] = held.get(weight.parameter, 0) + math.prod(weight.shape)
        return [name for name, count in held.items() if count == self.tensor(name).numel()]

    def tensor(self, name: str) -> Tensor:
        """The parameter or buffer of a name."""
        owner, _, attribute = name.rpartition(".")
        tensor = getattr(self.model.get_submodule(owner), attribute)
        assert isinstance(tensor, Tensor), f"{name} is a parameter or buffer"
        return tensor
