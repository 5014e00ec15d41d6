"""Recognizing layers in the calls of a model: which operand of a call is a weight, and where that comes from."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from quantkit.program.convolutions import CONVOLUTIONS, named_arguments
from quantkit.program.intercept import OpKey
from quantkit.program.layers import LayerWeight, Region, layer_kind, weight_at
from quantkit.program.updates import named_state

_READ = ("input", "weight", "bias")  # the first arguments of a linear layer
_PRODUCTS = frozenset("matmul rmatmul mm mv bmm addmm baddbmm addbmm grouped_mm grouped_mm_fallback".split())
_RECURRENT = frozenset("lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell".split())


@dataclass(frozen=True)
class Product:
    """A product in a call: what it is, the tensor that is the weight, the axes of its output channels and of its
    inputs, the tensor that is read, and the bias.
    """

    kind: str
    weight: Tensor
    source: Tensor | None
    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    bias: Tensor | None = None
    groups: int = 1


PRODUCTS = frozenset({"linear", "bilinear", "embedding", "embedding_bag", *CONVOLUTIONS, *_PRODUCTS, *_RECURRENT})


def products_of(
    op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], fixed: Callable[[Tensor], bool]
) -> list[Product]:
    """The products of a call with operands that are ``fixed``: that do not depend on the model's inputs."""
    if op not in PRODUCTS:
        return []
    found: list[Product | None]
    if op == "bilinear":
        found = [_bilinear(args, kwargs)]
    elif op in ("linear", "embedding", "embedding_bag", *CONVOLUTIONS):
        found = [_named(op, args, kwargs)]
    elif op in _PRODUCTS:
        found = [*_matrices(op, args)]
    else:
        found = [*_recurrent(op, args)]
    return [p for p in found if p is not None and is_weight(p.weight) and fixed(p.weight)]


def is_weight(tensor: Tensor) -> bool:
    """Whether a tensor, multiplied, is a matrix or more of numbers that can be quantized."""
    return tensor.dim() > 1 and tensor.numel() > 0 and tensor.is_floating_point()


def _named(op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Product | None:
    if op in CONVOLUTIONS:
        given = named_arguments(op, args, kwargs)
    else:
        given = dict(zip(_READ, args, strict=False)) | dict(kwargs)
    weight, source, bias = given.get("weight"), given.get("input"), given.get("bias")
    if not isinstance(weight, Tensor) or not isinstance(source, Tensor):
        return None
    bias = bias if isinstance(bias, Tensor) and "embedding" not in op else None
    return Product(op, weight, source, (0,), tuple(range(1, weight.dim())), bias, int(given.get("groups", 1)))


def _bilinear(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Product:
    given = dict(zip(("input1", "input2", "weight", "bias"), args, strict=False)) | dict(kwargs)
    return Product("bilinear", given["weight"], given["input1"], (0,), (1, 2), given.get("bias"))


def _matrices(op: str, args: tuple[Any, ...]) -> list[Product]:
    """Both operands of a product of matrices, as weights of what the other one reads."""
    operands = args[-2:] if op in ("addmm", "baddbmm", "addbmm") else args[:2]
    if len(operands) < 2 or not all(isinstance(x, Tensor) for x in operands):
        return []
    left, right = operands if op != "rmatmul" else operands[::-1]
    bias = args[0] if op == "addmm" and isinstance(args[0], Tensor) and args[0].dim() == 1 else None
    found = []
    for weight, source, out, into in ((right, left, -1, -2), (left, right, -2, -1)):
        if weight.dim() > 1 and source.dim() > 0:
            axes = (*range(weight.dim() - 2), weight.dim() + out)
            found.append(Product("matmul", weight, source, axes, (weight.dim() + into,), bias if out == -1 else None))
    return found


def _recurrent(op: str, args: tuple[Any, ...]) -> list[Product]:
    """The input and recurrent matrices of a recurrent step, or of all steps at once."""
    flat = [x for arg in args[1:] for x in (arg if isinstance(arg, tuple | list) else (arg,)) if isinstance(x, Tensor)]
    return [Product("recurrent", x, args[0], (0,), (1,)) for x in flat if x.dim() == 2]


def operations_per_sample(product: Product, result: Tensor, samples: int) -> int:
    """Multiply-accumulates: the values a layer makes (a transposed convolution: reads) times the weights that each of
    them meets.
    """
    weight, source = product.weight, product.source
    if "embedding" in product.kind or source is None:
        return 0
    if product.kind == "recurrent":
        return source.numel() // source.shape[-1] * weight.numel() // samples
    if product.kind.startswith("conv_transpose"):
        return source.numel() * weight[0].numel() // samples
    return result.numel() * math.prod(weight.shape[axis] for axis in product.inputs) // samples


class Owners:
    """Finds the parameter that holds a tensor, and the layer's name."""

    def __init__(self, model: nn.Module) -> None:
        self.named = {name: x for name, x in named_state(model).items() if x.is_floating_point()}
        self.by_id: dict[int, str] = {}
        self.by_memory: dict[int, str] = {}
        own = [f"{n}.weight" if n else "weight" for n, m in model.named_modules() if layer_kind(m) is not None]
        for name in (*own, *self.named):  # of several names that of a module of a common kind counts
            tensor = self.named[name]
            self.by_id.setdefault(id(tensor), name)
            if tensor.numel():
                self.by_memory.setdefault(tensor.untyped_storage().data_ptr(), name)
        self.modules = {name for name, _ in model.named_modules()}
        # matrices picked out of a parameter by numbers, as those of the experts that a token has chosen: the
        # parameter's name, and the strides of the matrices' rows and columns
        self.picked: Any = WeakTensorKeyDictionary()

    def follow(self, op: str, args: tuple[Any, ...], result: Any) -> None:
        """Note where a call picks matrices out of a parameter, or makes a view of such."""
        if not isinstance(result, Tensor) or not args or not isinstance(args[0], Tensor):
            return
        source, name = args[0], self.by_id.get(id(args[0]))
        if source in self.picked:
            if result.untyped_storage().data_ptr() == source.untyped_storage().data_ptr():
                self.picked[result] = self.picked[source]
        elif name is not None and source.dim() == 3 and _picks_first(op, args):
            self.picked[result] = (name, result.stride()[-2:])

    def parameter_of(self, tensor: Tensor) -> str | None:
        """The name of the parameter or buffer that a tensor is, or is a view of."""
        if id(tensor) in self.by_id:
            return self.by_id[id(tensor)]
        name = self.by_memory.get(tensor.untyped_storage().data_ptr())
        return name if name is not None and self.named[name].dtype == tensor.dtype else None

    def layer(self, product: Product, key: OpKey, sources: Collection[str]) -> tuple[str, LayerWeight] | None:
        """The name of the layer that a product is a call of, and where its weight is."""
        weight = product.weight
        name = self.parameter_of(weight)
        bias = self.by_id.get(id(product.bias)) if product.bias is not None else None
        if weight in self.picked:
            return self._picked(product)
        if name is None:
            if not sources:
                return None  # a constant of the code: nothing that the model stores
            own = key.scope if any(source.rpartition(".")[0] == key.scope for source in sources) else str(key)
            return own or str(key), self._computed(product, tuple(sorted(sources)), bias)
        parameter = self.named[name]
        if weight is parameter and product.outputs == (0,):
            return self._layer_name(name), weight_at(product.kind, name, parameter, product.groups, bias)
        return self._view(name, product, bias)

    def _picked(self, product: Product) -> tuple[str, LayerWeight]:
        """The layer of matrices that were picked out of a parameter: all that it has."""
        name, strides = self.picked[product.weight]
        count, *sides = self.named[name].shape
        into = strides.index(product.weight.stride(product.inputs[0]))
        order = (0, 2 - into, 1 + into)
        shape = (count * sides[1 - into], sides[into])
        return self._layer_name(name), LayerWeight("matmul", shape, name, None, order)

    def _computed(self, product: Product, sources: tuple[str, ...], bias: str | None) -> LayerWeight:
        """The layer of a weight that is computed from parameters."""
        weight = product.weight
        order = (*product.outputs, *product.inputs)
        return LayerWeight(
            product.kind,
            _joined(weight, product),
            None,
            Region(tuple(weight.shape), weight.stride(), 0),
            None if order == tuple(range(weight.dim())) else order,
            bias,
            product.groups,
            sources,
        )

    def _layer_name(self, parameter: str) -> str:
        """The module that owns the parameter as its weight, or the parameter."""
        owner, _, attribute = parameter.rpartition(".")
        return owner if attribute == "weight" and owner in self.modules and owner else parameter

    def _view(self, name: str, product: Product, bias: str | None) -> tuple[str, LayerWeight] | None:
        """The layer of a view of a parameter."""
        parameter, weight = self.named[name], product.weight
        offset = int(weight.storage_offset() - parameter.storage_offset())
        order: tuple[int, ...] | None = (*product.outputs, *product.inputs)
        shape = _joined(weight, product)
        size, stride, label = tuple(weight.shape), weight.stride(), self._layer_name(name)
        if weight.numel() < parameter.numel():
            whole = parameter.dim() == weight.dim() + 1 and parameter.stride()[1:] == stride
            if whole and offset % parameter.stride(0) == 0 and parameter.shape[1:] == weight.shape:
                # one expert of several: all of them are one layer, so that those no input reaches have codes too
                size, stride, offset = tuple(parameter.shape), parameter.stride(), 0
                order = (0, *(axis + 1 for axis in order or ()))
                shape = (parameter.shape[0] * shape[0], *shape[1:])
            else:
                label = f"{name}{_part_name(parameter, weight, offset)}"
        plain = order == tuple(range(len(size))) and len(shape) == len(size)
        order = None if plain else order
        region = Region(size, stride, offset)
        if region == Region(tuple(parameter.shape), parameter.stride(), 0):
            region = None  # type: ignore[assignment]
        return label, LayerWeight(product.kind, shape, name, region, order, bias, product.groups)


def _picks_first(op: str, args: tuple[Any, ...]) -> bool:
    """Whether a call picks entries along the first axis of what it reads, by numbers that are a tensor."""
    if op == "index_select":
        return len(args) > 2 and args[1] == 0
    return op == "getitem" and isinstance(args[1], Tensor) and not args[1].is_floating_point()


def _joined(weight: Tensor, product: Product) -> tuple[int, ...]:
    """The shape of a weight with its output channels joined to one axis, first."""
    return math.prod(weight.shape[a] for a in product.outputs), *(weight.shape[a] for a in product.inputs)


def _part_name(parameter: Tensor, weight: Tensor, offset: int) -> str:
    """``.q``, ``.k`` and ``.v`` for thirds of a matrix, ``[start:stop]`` for other rows."""
    rows = weight.numel() * parameter.shape[0] // parameter.numel()
    start = offset // max(1, parameter.stride(0))
    if rows * 3 == parameter.shape[0] and start % max(1, rows) == 0:
        return f".{'qkv'[start // rows]}"
    return f"[{start}:{start + rows}]"
