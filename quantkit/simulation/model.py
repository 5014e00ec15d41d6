"""A model that computes as its exported integer form does: dequantized weights, fake-quantized sites.

The codes are the truth: ``weights`` and ``ranges`` are what packing, kernels and the ONNX writer read, and the wrapped
module's own weights are their dequantized values, so its class, methods and gradients stay what they were.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from quantkit.numbers.kinds import AnyRange, AnyWeight
from quantkit.numbers.ratios import Ratio
from quantkit.program.arguments import replaced
from quantkit.program.halves import in_single, stores_halves
from quantkit.program.integer_biases import BiasCall
from quantkit.program.intercept import Handler, OpKey, change_inputs, change_read, device_of, intercept, map_tensors
from quantkit.program.layers import Operands, Substitutes, Weights
from quantkit.program.sites import Site, coded_sites
from quantkit.program.tracing import calling
from quantkit.program.updates import restored, without_autocast
from quantkit.simulation.call_biases import CallBiases, call_biases


def at_sites(sites: Iterable[Site], change: Callable[[Site, Tensor], Tensor]) -> Callable[[OpKey, Tensor], Tensor]:
    """A function of (place, tensor) that applies ``change`` to the tensors of ``sites`` and leaves all others
    alone.
    """
    places = {place: site for site in sites for place in site.places}
    return lambda place, tensor: change(places[place], tensor) if place in places else tensor


def read_by_layers(sites: Iterable[Site]) -> dict[str, OpKey]:
    """Layer -> the place of the one site that it reads."""
    read: dict[str, list[OpKey]] = {}
    for site in sites:
        for name in site.consumers:
            read.setdefault(name, []).append(site.place)
    return {name: places[0] for name, places in read.items() if len(places) == 1}


@dataclass(frozen=True)
class Watch:
    """What happens at the torch calls of a model: ``change(place, tensor)`` is applied to its inputs, to what every
    call makes and to what it reads first (``read_place``).

    ``before(key, args, kwargs)`` sees each call first, ``call(key, func, args, kwargs)`` carries it out. ``operands``
    take the place of tensors that calls read: by key, the position among them and the tensor; what ``substitutes``
    compute takes that of the parameters with these identities. ``outside`` are tensors that were passed to a part of
    the model: a layer that reads one quantizes it by the place in ``reads``, as what makes it in the whole model does
    not run. ``biases``: of calls that add a bias on a grid of their own, by key, that bias and what they read instead.
    """

    change: Callable[[OpKey, Tensor], Tensor]
    before: Callable[[OpKey, Any, Any], None] | None = None
    call: Handler | None = None
    operands: Operands = field(default_factory=dict)
    outside: Sequence[Tensor] = ()
    reads: Mapping[str, OpKey] = field(default_factory=dict)
    substitutes: Substitutes = field(default_factory=dict)
    biases: CallBiases = field(default_factory=dict)

    def handle(self, key: OpKey, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Carry out one call."""
        if key in self.operands:
            args, kwargs = _with_operand(args, kwargs, *self.operands[key])
        if key in self.biases:
            own, rounded = self.biases[key]
            args, kwargs = replaced((args, kwargs), lambda x: rounded if x is own else x)
        if self.substitutes:
            args, kwargs = replaced((args, kwargs), self._substituted)
        args, kwargs = change_read(key, args, kwargs, self._read)
        if self.before is not None:
            self.before(key, args, kwargs)
        result = func(*args, **kwargs) if self.call is None else self.call(key, func, args, kwargs)
        changed = map_tensors(result, key, self.change)
        if changed is not result and any(result is a for a in (*args, *kwargs.values())):
            return _put_in_place(result, lambda x: map_tensors(x, key, self.change), changed)
        return changed

    def _read(self, place: OpKey, tensor: Tensor) -> Tensor:
        if self.outside and place.scope in self.reads and any(_share(tensor, x) for x in self.outside):
            tensor = self.change(self.reads[place.scope], tensor)
        return self.change(place, tensor)

    def _substituted(self, value: Any) -> Any:
        return self.substitutes[id(value)]() if id(value) in self.substitutes else value


def _share(one: Tensor, other: Tensor) -> bool:
    """Whether a tensor is another, or a view of it."""
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


@contextmanager
def watching(model: nn.Module, watch: Watch) -> Iterator[None]:
    """Watch the torch calls of ``model`` inside the block, whichever of its methods is called."""

    def enter(args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return change_inputs(model, args, kwargs, watch.change)

    with without_autocast(model), intercept(model, watch.handle, enter_model=enter):
        yield


def run_with(model: nn.Module, change: Callable[[OpKey, Tensor], Tensor], args: Any, kwargs: Any, **seen: Any) -> Any:
    """Run ``model`` once, watched: ``seen`` are the other fields of ``Watch``. What its forward updates stays so."""
    with watching(model, Watch(change, **seen)):
        return model(*args, **kwargs)


def _with_operand(args: Any, kwargs: Any, position: int, operand: Tensor) -> tuple[Any, Any]:
    """The arguments of a call with one of the tensors it reads replaced."""
    count = iter(range(1 << 30))
    return replaced((args, kwargs), lambda x: operand if isinstance(x, Tensor) and next(count) == position else x)


def _put_in_place(result: Tensor, change: Callable[[Tensor], Tensor], changed: Tensor) -> Tensor:
    """Write the changed values of an in-place operation back: other holders of this tensor must see its codes too."""
    if not result.requires_grad:
        return result.copy_(changed)
    changed = change(result.clone())  # its gradient is asked of the values before they are overwritten
    result.data.copy_(changed.detach())
    return changed


class SimulatedModel(nn.Module):
    """``model`` with quantized layers and sites; gradients go through to it.

    ``weights``: layer name -> codes; ``ranges``: site name -> quantizer. Sites without a range stay float. ``floats``
    says where the layers' weights are (default: in modules of the common kinds), ``updated`` which tensors a forward
    changes that are to stay, ``bias_calls`` the calls that round their bias for themselves. Computes in float32:
    inputs of other floating-point types, which the user's model may take, become that. ``half_floats``: what stays
    float is stored as float16, and has its values.
    """

    half_floats: bool = False
    bias_calls: tuple[BiasCall, ...] = ()

    def __init__(
        self,
        model: nn.Module,
        sites: Iterable[Site],
        weights: Mapping[str, AnyWeight],
        ranges: Mapping[str, AnyRange],
        floats: Weights | None = None,
        updated: Iterable[str] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.sites, self.updated = tuple(sites), tuple(updated)
        self.floats = Weights.of_modules(model) if floats is None else floats
        self.weights: dict[str, AnyWeight] = {}
        self.ranges: dict[str, AnyRange] = dict(ranges)
        for name, weight in weights.items():
            self.set_weight(name, weight)

    def set_weight(self, name: str, weight: AnyWeight) -> None:
        """Give a layer its codes; what it computes with becomes their dequantized value, which takes the place of a
        parameter in half precision call by call. Codes are those of the weight times the ratio, if any, by which the
        layer's input is divided as it is read. Scales of 8 bits that FP8 activations meet make FP8 products.
        """
        if weight.integer:
            ratio = next((r for site in self.sites if name in site.consumers and (r := self._ratio(site))), ())
            weight = replace(weight, ratio=ratio)
        if weight.integer and weight.format.scale == "f8":
            read = [self.ranges.get(site.name) for site in self.sites if name in site.consumers]
            weight = replace(weight, in_fp8=any(found is not None and found.format.is_fp8 for found in read))
        self.weights[name] = weight
        if not self.floats.stores_half(name):
            self.floats.write(name, weight.dequantize())

    def _ratio(self, site: Site) -> Ratio:
        found = self.ranges.get(site.name)
        return found.ratio if found is not None and found.integer else ()

    def in_float32(self) -> SimulatedModel:
        """The same on a float32 copy of the model, which holds what it computes with; itself where it is float32."""
        if not stores_halves(self.model):
            return self
        return self._on(copy.deepcopy(self.model).float())

    def on_cpu(self) -> SimulatedModel:
        """The same on a copy of the model on the CPU; itself where it is there."""
        return self if device_of(self.model).type == "cpu" else self._on(copy.deepcopy(self.model).cpu())

    def _on(self, model: nn.Module) -> SimulatedModel:
        floats = self.floats.on(model)
        other = SimulatedModel(model, self.sites, self.weights, self.ranges, floats, self.updated).eval()
        other.half_floats, other.bias_calls = self.half_floats, self.bias_calls
        return other

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*tree_map(in_single, (args, kwargs)))

    def run(self, args: Any, kwargs: Any, before: Callable[[OpKey, Any, Any], None] | None = None) -> Any:
        """``forward``, with ``before(key, args, kwargs)`` called ahead of every torch call inside the model."""
        with self.quantizing(before=before):
            return self.model(*args, **kwargs)

    @contextmanager
    def quantizing(
        self,
        outside: Sequence[Tensor] = (),
        before: Callable[[OpKey, Any, Any], None] | None = None,
        change: Callable[[OpKey, Tensor], Tensor] | None = None,
    ) -> Iterator[None]:
        """The module, or a part of it that takes tensors from ``outside``, computes quantized inside the block; with
        ``change(place, tensor)`` in the place of the sites' quantizers.
        """
        coded = coded_sites(self.sites, self.ranges)
        at_coded = at_sites(coded, lambda site, tensor: self.ranges[site.name].fake_quantize(tensor))
        floats, codes, reads = self.floats, self.weights, read_by_layers(coded)
        operands, substitutes = floats.operands(codes), floats.substitutes(codes)
        watch = Watch(
            change or at_coded, before, operands=operands, outside=outside, reads=reads, substitutes=substitutes,
            biases=call_biases(self.bias_calls, floats, codes, self.ranges),
        )  # fmt: skip
        # With weights alone in codes, held by the modules themselves, there is nothing to change on the way.
        watched = before is not None or change is not None
        plain = not (watched or coded or operands or substitutes or stores_halves(self.model))
        seen = without_autocast(self.model) if plain else watching(self.model, watch)
        with calling(), restored(self.model, self.updated), seen:
            yield


def as_float(model: nn.Module, floats: Weights | None = None, updated: Iterable[str] = ()) -> SimulatedModel:
    """A model with nothing quantized, called as the quantized one is."""
    return SimulatedModel(model, (), {}, {}, floats, updated)
