"""Variations of one plan, run together: what a network computes before the first change is not computed again.

Most of what is measured differs from a plan (or from the float model) in one or two layers. Layers that ran before
those give what they gave, so their outputs are recorded in one run of a batch and played back in the runs of its
variations. Results are the same bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from quantkit.numbers.kinds import AnyQuantizer
from quantkit.program.layers import layer_kind, weight_of
from quantkit.sensitivity.measure import AtSites, Perturbation, Place, Subject, applied, swapped_weights

Changes = Mapping[Place, AnyQuantizer]


def variations(subject: Subject, plans: Sequence[Sequence[Perturbation]]) -> Iterator[tuple[int, int, Tensor]]:
    """(batch, plan, output (rows, classes)) of every plan on every batch, batch after batch.

    The first plan is the one that the others vary; what a plan leaves out is as in the subject's base. Memory: the
    outputs of all layers for one batch.
    """
    model = subject.model
    layers = [name for name, module in model.named_modules() if layer_kind(module) is not None]
    own = {name: weight_of(model, name).data for name in layers}
    states = [{p.place: p.change for p in [*subject.base, *plan]} for plan in plans]
    changed = [_differences(states[0], state) for state in states]
    watched = {name for places in changed for name, at_site in places if at_site}
    weights, _ = applied([*subject.base, *plans[0]])
    for number, batch in enumerate(subject.batches):
        alone, tape = replace(subject, batches=[batch]), _Tape(model, layers)
        for k, state in enumerate(states):
            moved = {name: _weight(state, name, own) for name, at_site in changed[k] if not at_site}
            at: AtSites = {n: c.fake_quantize for (n, _), c in state.items() if not c.stored}
            if k == 0:
                at |= {name: tape.noting(name, at.get(name, _as_it_is)) for name in {*at, *watched}}
            with swapped_weights(model, weights), tape.playing(changed[k]) if k else tape.recording():
                output = next(alone.outputs_with(moved, at))
            yield number, k, output


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _differences(first: Changes, other: Changes) -> set[Place]:
    return {place for place in {*first, *other} if first.get(place) is not other.get(place)}


def _weight(state: Changes, layer: str, own: Mapping[str, Tensor]) -> Tensor:
    change = state.get((layer, False))
    return change.dequantize() if change is not None and change.stored else own[layer]


class _Tape:
    """The outputs of layers in one run of a model, and when they and the watched sites came about."""

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        self.modules = {name: model.get_submodule(name) for name in layers}
        self.weights = {name: weight_of(model, name) for name in layers}
        self.outputs: dict[str, list[Tensor]] = {name: [] for name in layers}
        self.first: dict[Place, int] = {}
        self.last: dict[Place, int] = {}
        self.now = 0

    def _note(self, place: Place) -> None:
        self.now += 1
        self.first.setdefault(place, self.now)
        self.last[place] = self.now

    def noting(self, site: str, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """What a site does to its tensor, and a note of when."""

        def noted(tensor: Tensor) -> Tensor:
            self._note((site, True))
            return function(tensor)

        return noted

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what the layers give inside the block."""
        with ExitStack() as stack:
            for name, module in self.modules.items():
                stack.enter_context(_forward(module, self._recorded(name, module.forward)))
            yield

    def _recorded(self, name: str, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def record(*args: Any, **kwargs: Any) -> Tensor:
            output = forward(*args, **kwargs)
            self._note((name, False))
            self.outputs[name].append(output.clone())  # a later operation may work on it in place
            return output

        return record

    @contextmanager
    def playing(self, changed: Collection[Place]) -> Iterator[None]:
        """Inside the block the layers whose last call came before anything ``changed`` give what they gave."""
        touched = {self.weights[name] for name, at_site in changed if not at_site and name in self.weights}
        shared = {(name, False) for name, weight in self.weights.items() if weight in touched}  # tied weights
        # What did not run where it could be seen (a weight that a function reads) may have been used at any time.
        until = min((self.first.get(place, 0) for place in {*changed, *shared}), default=math.inf)
        with ExitStack() as stack:
            for name, module in self.modules.items():
                if self.last.get((name, False), math.inf) < until:
                    stack.enter_context(_forward(module, self._played(name)))
            yield

    def _played(self, name: str) -> Callable[..., Tensor]:
        calls = iter(self.outputs[name])
        return lambda *args, **kwargs: next(calls).clone()


@contextmanager
def _forward(module: nn.Module, function: Callable[..., Tensor]) -> Iterator[None]:
    """The module computes with this function inside the block."""
    before = vars(module).get("forward")
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
