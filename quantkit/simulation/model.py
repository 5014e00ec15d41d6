"""A model that computes as its exported integer form does: dequantized weights, fake-quantized sites.

The codes are the truth: ``weights`` and ``ranges`` are what packing, kernels and the ONNX writer read, and the wrapped
module's own weights are their dequantized values, so its class, methods and gradients stay what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from quantkit.numbers.kinds import AnyRange
from quantkit.numbers.uniform import QuantizedWeight
from quantkit.program.intercept import Handler, OpKey, change_inputs, change_read, intercept, map_tensors
from quantkit.program.layers import weight_of
from quantkit.program.sites import Site


def at_sites(sites: Iterable[Site], change: Callable[[Site, Tensor], Tensor]) -> Callable[[OpKey, Tensor], Tensor]:
    """A function of (place, tensor) that applies ``change`` to the tensors of ``sites`` and leaves all others
    alone.
    """
    places = {site.place: site for site in sites}
    return lambda place, tensor: change(places[place], tensor) if place in places else tensor


def run_with(
    model: nn.Module,
    change: Callable[[OpKey, Tensor], Tensor],
    args: Any,
    kwargs: Any,
    before: Callable[[OpKey, Any, Any], None] | None = None,
    call: Handler = lambda key, func, args, kwargs: func(*args, **kwargs),
) -> Any:
    """Run ``model`` with ``change(place, tensor)`` applied to its inputs, to what every torch call inside it makes and
    to what it reads first (``read_place``).

    ``before(key, args, kwargs)`` sees each call first, ``call(key, func, args, kwargs)`` carries it out.
    """

    def handle(key: OpKey, func: Callable[..., Any], call_args: Any, call_kwargs: Any) -> Any:
        call_args, call_kwargs = change_read(key, call_args, call_kwargs, change)
        if before is not None:
            before(key, call_args, call_kwargs)
        result = call(key, func, call_args, call_kwargs)
        changed = map_tensors(result, key, change)
        if changed is not result and any(result is a for a in (*call_args, *call_kwargs.values())):
            return _put_in_place(result, lambda x: map_tensors(x, key, change), changed)
        return changed

    args, kwargs = change_inputs(model, args, kwargs, change)
    with intercept(model, handle):
        return model(*args, **kwargs)


def _put_in_place(result: Tensor, change: Callable[[Tensor], Tensor], changed: Tensor) -> Tensor:
    """Write the changed values of an in-place operation back: other holders of this tensor must see its codes too."""
    if not result.requires_grad:
        return result.copy_(changed)
    changed = change(result.clone())  # its gradient is asked of the values before they are overwritten
    result.data.copy_(changed.detach())
    return changed


def _widened(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


class SimulatedModel(nn.Module):
    """``model`` with quantized layers and sites. Calls, attributes and gradients go through to the wrapped module.

    ``weights``: layer name -> codes; ``ranges``: site name -> quantizer. Sites without a range stay float. Computes in
    float32: half-precision inputs, which a half-precision model takes, are widened.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Iterable[Site],
        weights: Mapping[str, QuantizedWeight],
        ranges: Mapping[str, AnyRange],
    ) -> None:
        super().__init__()
        self.model = model
        self.sites = tuple(sites)
        self.weights: dict[str, QuantizedWeight] = {}
        self.ranges: dict[str, AnyRange] = dict(ranges)
        for name, weight in weights.items():
            self.set_weight(name, weight)

    def set_weight(self, name: str, weight: QuantizedWeight) -> None:
        """Give a layer its codes; its module's weight becomes their dequantized value."""
        self.weights[name] = weight
        with torch.no_grad():
            weight_of(self.model, name).copy_(weight.dequantize())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*tree_map(_widened, (args, kwargs)))

    def run(self, args: Any, kwargs: Any, before: Callable[[OpKey, Any, Any], None] | None = None) -> Any:
        """``forward``, with ``before(key, args, kwargs)`` called ahead of every torch call inside the model."""
        quantized = [site for site in self.sites if site.name in self.ranges]
        change = at_sites(quantized, lambda site, tensor: self.ranges[site.name].fake_quantize(tensor))
        return run_with(self.model, change, args, kwargs, before)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):
                raise  # how Python copies or pickles the wrapped module is not how this one is
            return getattr(super().__getattr__("model"), name)


def as_float(model: nn.Module) -> SimulatedModel:
    """A model with nothing quantized, called as the quantized one is."""
    return SimulatedModel(model, (), {}, {})
