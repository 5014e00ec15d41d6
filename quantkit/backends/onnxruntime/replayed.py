"""The program of a model as a module that torch.export follows: for models whose own code takes another path while it
is exported, as grouped-query attention in transformers does, or that fixes sizes which the program follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from quantkit.program.inputs import Batch
from quantkit.program.intercept import OpKey, change_inputs, tensors_of
from quantkit.program.program import Program, Step
from quantkit.program.updates import named_state
from quantkit.simulation.model import SimulatedModel

SCOPES = "scopes"  # the attribute that holds the skeleton of the model's modules
Change = Callable[[OpKey, Tensor], Tensor]


class _Scope(nn.Module):
    """A module of the skeleton: carries out calls, so that the exporter notes where they belong."""

    def forward(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)


def with_inputs_as_given(program: Program, model: nn.Module, example: Batch) -> Program:
    """A program whose inputs come in the order of the example's tensors, as files have them: the model's forward may
    have its keywords in another one.
    """
    leaves, spec = tree_flatten(example)
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    for position, i in enumerate(tensors):
        leaves[i] = torch.tensor(position, device="cpu")
    args, kwargs = tree_unflatten(leaves, spec)
    ordered = change_inputs(model, args, kwargs, lambda _, tensor: tensor)
    number = dict(zip(map(int, tensors_of(ordered)), program.inputs, strict=True))
    return replace(program, inputs=tuple(number[position] for position in range(len(tensors))))


class ReplayedModel(nn.Module):
    """A simulated model as a function from its input tensors to its output tensors: its program, replayed.

    ``change(place, tensor)`` is applied to inputs and to what calls make, ``marked(name, tensor)`` to
    parameters, and by a layer's name to a weight that is computed; ``enter(inputs)`` is called first.
    """

    def __init__(
        self,
        simulated: SimulatedModel,
        program: Program,
        change: Change,
        marked: Callable[[str, Tensor], Tensor],
        enter: Callable[[Sequence[Tensor]], None],
    ) -> None:
        super().__init__()
        self.model, self.change, self.marked, self.enter = simulated.model, change, marked, enter
        self.scopes = _Scope()
        for step in program.steps:
            self._add_scope(step.key.scope)
        steps = tuple(replace(step, func=self._scoped(step)) for step in program.steps)
        self.program = replace(program, steps=steps, channels_last=False)
        layers = program.weights
        computed = {n: w for n, w in simulated.floats.computed.items() if n in simulated.weights}
        self.computed = {
            str(number): (name, layers[name].operand(value, layers[name].region.size))  # type: ignore[union-attr]
            for name, value in computed.items()
            for number in layers[name].numbers
        }

    def _add_scope(self, scope: str) -> None:
        module: nn.Module = self.scopes
        for part in scope.split(".") if scope else ():
            if part not in module._modules:
                module.add_module(part, _Scope())
            module = module._modules[part]  # type: ignore[assignment]

    def _scoped(self, step: Step) -> Callable[..., Any]:
        if not step.key.scope:
            return step.func
        module, func = self.scopes.get_submodule(step.key.scope), step.func
        return lambda *args, **kwargs: module(func, args, kwargs)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        self.enter(inputs)
        places = self.program.producer
        values = {
            number: self.change(places[number], x) if number in places else x
            for number, x in zip(self.program.inputs, inputs, strict=True)
        }
        state = {name: self.marked(name, tensor) for name, tensor in named_state(self.model).items()}
        state |= {number: self.marked(name, operand) for number, (name, operand) in self.computed.items()}
        return tuple(self.program.replay(values, state, self.program.outputs, self.change))
