"""A model that computes as its exported integer form does, on integers: packed weights, low-bit products.

It is the same module as in ``SimulatedModel`` and runs in its own class. What differs is each torch call of a
quantized layer, which goes to an integer kernel on the codes of its input; float weights are no longer held. Outputs
differ from the simulated ones by float32 rounding only, which may move a value to the next code of a site. There are
no gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import InvalidRequest
from quantkit.numbers.packed_weight import PackedWeight, dequantize_packed, pack_weight, unpack_weight
from quantkit.numbers.per_token import TokenRange
from quantkit.numbers.uniform import QuantizedWeight, SiteRange
from quantkit.program.intercept import OpKey
from quantkit.program.layers import bias_of, layer_kind, weight_of
from quantkit.program.sites import Site
from quantkit.progress import notice
from quantkit.runtime.int_conv.layer import IntConv
from quantkit.runtime.int_linear.layer import IntLinear
from quantkit.simulation.model import SimulatedModel, at_sites, run_with

KERNEL_BITS = 8  # of the codes that integer kernels make of tokens
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


class PackedLayer(nn.Module):
    """A layer without an integer kernel: its packed weight is dequantized in every call."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        packed = pack_weight(weight)
        self.shape, self.format = packed.shape, packed.format
        for name in ("codes", "scale", "zero_point"):
            self.register_buffer(name, getattr(packed, name))

    def packed(self) -> PackedWeight:
        return PackedWeight(self.codes, self.scale, self.zero_point, None, self.shape, self.format)

    def quantized(self) -> QuantizedWeight:
        return unpack_weight(self.packed())

    def dequantized(self) -> Tensor:
        return dequantize_packed(self.packed())

    @property
    def weight_bytes(self) -> int:
        return self.packed().nbytes

    @property
    def expanded_bytes(self) -> int:
        return 0


RealLayer = IntLinear | IntConv | PackedLayer


def real_layer(
    name: str,
    kind: str | None,
    weight: QuantizedWeight,
    bias: Tensor | None,
    site: SiteRange | TokenRange | None,
    expand: bool,
) -> RealLayer:
    """The layer that computes with these codes on the input that ``site`` quantizes; where there is no integer kernel
    for it, one that dequantizes, with a notice.
    """
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
        raise InvalidRequest(f"{kind} with {weight.format} has no integer kernel")
    except InvalidRequest as reason:
        notice(f"Layer {name!r} runs on dequantized weights: {reason}")
        return PackedLayer(weight)


class RealModel(nn.Module):
    """``simulated`` on integer kernels. Calls and attributes go through to the wrapped module, whose quantized weights
    are placeholders without memory.

    ``expand`` keeps 8-bit expansions of weights that kernels cannot read as they are packed: faster, and counted in
    ``expanded_bytes``.
    """

    def __init__(self, simulated: SimulatedModel, expand: bool = False) -> None:
        super().__init__()
        own = simulated.model
        placeholders = {
            id(weight := weight_of(own, name)): nn.Parameter(torch.empty_like(weight, device="meta"), False)
            for name in simulated.weights
        }
        self.model = copy.deepcopy(own, dict(placeholders))
        self.sites, self.ranges = simulated.sites, dict(simulated.ranges)
        kinds = {name: layer_kind(module) for name, module in own.named_modules()}
        self.layers: dict[str, RealLayer] = {
            name: real_layer(name, kinds[name], weight, bias_of(own, name), self._input_of(name), expand)
            for name, weight in simulated.weights.items()
        }
        self.eval()

    def _input_of(self, name: str) -> SiteRange | TokenRange | None:
        """The one quantizer of a layer's input, None where it has several or none; tokens know no calls."""
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
    def weights(self) -> Mapping[str, QuantizedWeight]:
        """Layer name -> codes, unpacked: what packing and the ONNX writer read."""
        return {name: _quantized(layer, weight_of(self.model, name)) for name, layer in self.layers.items()}

    @property
    def weight_bytes(self) -> int:
        """Bytes of all layers' weights, counted from the tensors held: packed where quantized, float elsewhere."""
        held = sum(layer.weight_bytes for layer in self.layers.values())
        modules = {name: module for name, module in self.model.named_modules() if layer_kind(module) is not None}
        return held + sum(m.weight.nbytes for name, m in modules.items() if name not in self.layers)

    @property
    def expanded_bytes(self) -> int:
        return sum(layer.expanded_bytes for layer in self.layers.values())

    def simulated(self) -> SimulatedModel:
        """The simulated model these codes came from."""
        own = copy.deepcopy(self.model)
        for name in self.layers:
            own.get_submodule(name).weight = nn.Parameter(torch.empty(weight_of(own, name).shape))
        return SimulatedModel(own, self.sites, self.weights, self.ranges).eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        quantized = [site for site in self.sites if self._is_quantized(site)]
        change = at_sites(quantized, lambda site, tensor: self.ranges[site.name].fake_quantize(tensor))
        with torch.no_grad():
            return run_with(self.model, change, args, kwargs, call=self._call)

    def _call(self, key: OpKey, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """One torch call of the model, on integers where it is a quantized layer's."""
        layer = self.layers.get(key.scope)
        if isinstance(layer, IntLinear | IntConv):
            named = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
            own = weight_of(self.model, key.scope), bias_of(self.model, key.scope)
            if named.get("weight") is own[0] and named.get("bias") is own[1]:
                if isinstance(layer, IntLinear):
                    return layer(named["input"])
                return layer(func, named["input"], *(named[name] for name in _ARGUMENTS[3:] if name in named))
        if self.layers:
            args = tuple(self._filled(value) for value in args)
            kwargs = {name: self._filled(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _filled(self, value: Any) -> Any:
        """A placeholder's dequantized weight; every other value as it is."""
        if not (isinstance(value, Tensor) and value.is_meta):
            return value
        for name, layer in self.layers.items():
            if weight_of(self.model, name) is value:
                return _quantized(layer, value).dequantize()
        return value

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):
                raise
            return getattr(super().__getattr__("model"), name)


def _quantized(layer: RealLayer, weight: Tensor) -> QuantizedWeight:
    found = layer.quantized()
    return QuantizedWeight(found.codes.reshape(weight.shape), found.scale, found.zero_point, found.format)
