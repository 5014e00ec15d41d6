"""A model that computes as its exported integer form does, on integers: packed weights, low-bit products.

It is the same module as in ``SimulatedModel`` and runs in its own class. What differs is each torch call of a
quantized layer, which goes to an integer kernel on the codes of its input; float weights are no longer held. Outputs
differ from the simulated ones by float32 rounding only, which may move a value to the next code of a site. There are
no gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from quantkit.errors import InvalidRequest
from quantkit.numbers.kinds import AnyWeight
from quantkit.numbers.packed_weight import stored_tensors, stored_weight
from quantkit.numbers.per_token import TokenRange
from quantkit.numbers.uniform import SiteRange
from quantkit.program.arguments import leaves_of, replaced
from quantkit.program.convolutions import CONV_ARGUMENTS
from quantkit.program.halves import in_single, widened
from quantkit.program.intercept import OpKey
from quantkit.program.sites import Site
from quantkit.program.updates import restored
from quantkit.progress import notice
from quantkit.runtime.int_conv.layer import IntConv
from quantkit.runtime.int_linear.layer import IntLinear
from quantkit.simulation.call_biases import call_biases
from quantkit.simulation.model import SimulatedModel, Watch, at_sites, read_by_layers, watching

KERNEL_BITS = 8  # of the codes that integer kernels make of tokens


class PackedLayer(nn.Module):
    """A layer without an integer kernel: its packed weight is dequantized in every call."""

    def __init__(self, weight: AnyWeight) -> None:
        super().__init__()
        self.shape, self.format = weight.shape, weight.format
        self.ratio = weight.ratio if weight.integer else ()
        for name, tensor in stored_tensors(weight, "weight").items():
            self.register_buffer(name.rpartition(".")[2], tensor)

    def quantized(self) -> AnyWeight:
        held = {f"weight.{part}": tensor for part, tensor in self.named_buffers()}
        found = stored_weight(held, "weight", self.shape, self.format)
        return replace(found, ratio=self.ratio) if found.integer else found

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.buffers())

    @property
    def expanded_bytes(self) -> int:
        return 0


RealLayer = IntLinear | IntConv | PackedLayer


def real_layer(
    name: str,
    kind: str,
    weight: AnyWeight,
    bias: Tensor | None,
    site: SiteRange | TokenRange | None,
    expand: bool,
) -> RealLayer:
    """The layer that computes with these codes on the input that ``site`` quantizes; where there is no integer kernel
    for it, one that dequantizes, with a notice.
    """
    if not weight.integer:
        return PackedLayer(weight)
    try:
        if site is None:
            raise InvalidRequest("its input has no single quantizer")
        if not site.static:
            if kind == "linear" and site.bits == KERNEL_BITS:
                return IntLinear(weight, bias, None, expand)
            raise InvalidRequest(f"its kernel quantizes tokens to {KERNEL_BITS} bits, not {site.bits}")
        if kind == "linear":
            return IntLinear(weight, bias, site, expand)
        if kind in ("conv1d", "conv2d", "conv3d") and weight.scale.shape[1] == 1 and weight.zero_point is None:
            return IntConv(weight, bias, site, expand, name)
        raise InvalidRequest(
            f"{kind or 'a weight that is a part of a parameter'} with {weight.format} has no integer kernel"
        )
    except InvalidRequest as reason:
        notice(f"Layer {name!r} runs on dequantized weights: {reason}")
        return PackedLayer(weight)


class _Placeholder(nn.Parameter):
    """A parameter without memory. It says that it is where its codes are: models make tensors where their weights are,
    and their users put inputs there.
    """

    device = torch.device("cpu")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """What is computed of it outside its model has no values either: torch's own code believes ``device``, too."""
        with torch._C.DisableTorchFunctionSubclass():
            plain = replaced((args, kwargs or {}), lambda x: x.as_subclass(Tensor) if isinstance(x, cls) else x)
            return func(*plain[0], **plain[1])


class RealModel(nn.Module):
    """``simulated`` on integer kernels. The quantized weights of the module are placeholders without memory.

    ``expand`` keeps 8-bit expansions of weights that kernels cannot read as they are packed: faster, and counted in
    ``expanded_bytes``.
    """

    def __init__(self, simulated: SimulatedModel, expand: bool = False) -> None:
        super().__init__()
        floats = simulated.floats
        covered = floats.covered(simulated.weights)
        state = dict(simulated.model.named_parameters(remove_duplicate=False))
        placeholders = {
            id(state[name]): _Placeholder(torch.empty_like(state[name], device="meta"), False) for name in covered
        }
        self.model = copy.deepcopy(simulated.model, dict(placeholders))
        self.floats, self.updated = floats.on(self.model), simulated.updated
        self.sites, self.ranges = simulated.sites, dict(simulated.ranges)
        self.layers: dict[str, RealLayer] = {
            name: real_layer(name, self._kernel_kind(name), weight, floats.bias(name), self._input_of(name), expand)
            for name, weight in simulated.weights.items()
        }
        self.covered, self.half_floats = covered, simulated.half_floats
        self.bias_calls = simulated.bias_calls
        self.eval()

    def _kernel_kind(self, name: str) -> str:
        """The kind of a layer whose calls a kernel can stand for: those that read the whole of a parameter."""
        weight = self.floats.layers[name]
        return weight.kind if weight.parameter is not None and weight.region is None and weight.order is None else ""

    def _input_of(self, name: str) -> SiteRange | TokenRange | None:
        """The one quantizer of a layer's input, None where it has several or none; all calls share that of tokens."""
        read = [self.ranges.get(site.name) for site in self.sites if name in site.consumers]
        first = read[0] if read else None
        if first is None or not first.integer:
            return None
        alone = len(read) == 1 if first.static else set(read) == {first}
        return first if alone else None

    def _is_quantized(self, site: Site) -> bool:
        """Whether a site is quantized where it is: tokens of integer layers are, by their kernels."""
        found = self.ranges.get(site.name)
        inside = found is not None and not found.static and isinstance(self.layers[site.consumers[0]], IntLinear)
        return found is not None and not inside

    @property
    def weights(self) -> Mapping[str, AnyWeight]:
        """Layer name -> codes, unpacked: what packing and the ONNX writer read."""
        return {name: self._codes(name) for name in self.layers}

    def _codes(self, name: str) -> AnyWeight:
        found = self.layers[name].quantized()
        if not found.integer:
            return found
        shape = self.floats.layers[name].shape
        return replace(found, codes=found.codes.reshape(shape))

    @property
    def weight_bytes(self) -> int:
        """Bytes of all layers' weights, counted from the tensors held: packed where quantized, float elsewhere."""
        held = sum(layer.weight_bytes for layer in self.layers.values())
        others = [name for name in self.floats.layers if name not in self.layers]
        return held + sum(self.floats.stored_bytes(name) for name in others)

    @property
    def expanded_bytes(self) -> int:
        return sum(layer.expanded_bytes for layer in self.layers.values())

    def simulated(self) -> SimulatedModel:
        """The simulated model these codes came from."""
        state = dict(self.model.named_parameters(remove_duplicate=False))
        room = {id(state[name]): nn.Parameter(torch.empty(state[name].shape, device="cpu")) for name in self.covered}
        own = copy.deepcopy(self.model, dict(room))  # under all names of a parameter that is tied
        floats = self.floats.on(own)
        found = SimulatedModel(own, self.sites, self.weights, self.ranges, floats, self.updated).eval()
        found.half_floats, found.bias_calls = self.half_floats, self.bias_calls
        return found

    @contextmanager
    def quantizing(self, outside: Sequence[Tensor] = ()) -> Iterator[None]:
        """The module, or a part of it that takes tensors from ``outside``, computes on integers inside the block."""
        quantized = [site for site in self.sites if self._is_quantized(site)]
        change = at_sites(quantized, lambda site, tensor: self.ranges[site.name].fake_quantize(tensor))
        operands, reads = self.floats.operands(self.layers), read_by_layers(quantized)
        substitutes = self.floats.substitutes(self._beside_float())
        placeholders = {id(self.floats.tensor(name)): name for name in self.covered}
        call = partial(self._call, placeholders)
        coded = {call.layer: self._codes(call.layer) for call in self.bias_calls}
        watch = Watch(
            change, call=call, operands=operands, outside=outside, reads=reads, substitutes=substitutes,
            biases=call_biases(self.bias_calls, self.floats, coded, self.ranges),
        )  # fmt: skip
        with torch.no_grad(), restored(self.model, self.updated), watching(self.model, watch):
            yield

    def _beside_float(self) -> dict[str, AnyWeight]:
        """The codes of layers that share a parameter in half precision, which they cannot be written to, with float
        ones.
        """
        own = self.floats
        shared = [name for name in self.layers if own.layers[name].parameter not in self.covered]
        return {name: self._codes(name) for name in shared if own.stores_half(name)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(in_single, (args, kwargs))
        with self.quantizing():
            return self.model(*args, **kwargs)

    def _call(
        self, placeholders: Mapping[int, str], key: OpKey, func: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """One torch call of the model, on integers where it is a quantized layer's; ``placeholders`` names
        parameters by identity.
        """
        if not any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in leaves_of((args, kwargs))):
            return func(*args, **kwargs)
        named = dict(zip(CONV_ARGUMENTS, args, strict=False)) | kwargs
        name = placeholders.get(id(named.get("weight")))
        layer = None if name is None else self._kernel_of(name)
        if layer is not None and self.floats.layers[layer].kind == key.op:
            kernel, bias = self.layers[layer], self.floats.bias(layer)
            if isinstance(kernel, IntLinear) and named.get("bias") is bias:
                return kernel(named["input"])
            if isinstance(kernel, IntConv) and named.get("bias") is bias:
                return kernel(
                    func, named["input"], **{name: named[name] for name in CONV_ARGUMENTS[3:] if name in named}
                )
        args, kwargs = replaced((args, kwargs), lambda leaf: self._filled(leaf, placeholders.get(id(leaf))))
        return func(*args, **kwargs)

    def _kernel_of(self, parameter: str) -> str | None:
        return next(
            (name for name, w in self.floats.layers.items() if w.parameter == parameter and name in self.layers), None
        )

    def _filled(self, value: Any, name: str | None) -> Any:
        """The dequantized value, of all the layers it holds, of the placeholder of this name; what has none, as it
        is.
        """
        if name is None:
            return value
        filled = torch.empty_strided(value.shape, value.stride(), dtype=widened(value.dtype))
        for layer, weight in self.floats.layers.items():
            if weight.parameter == name:
                weight.write(filled, self._codes(layer).dequantize())
        return filled
