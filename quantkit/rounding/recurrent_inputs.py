"""The inputs of a recurrent layer's matrices as rows. torch runs all steps and layers of a recurrence in one call;
what its matrices multiply on the way is made again here, one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quantkit.program.arguments import Ref, leaves_of
from quantkit.program.program import Program, Step
from quantkit.rounding.layer_inputs import LayerInputs


def recurrent_inputs(program: Program, name: str, step: Step, args: tuple[Any, ...]) -> LayerInputs | None:
    """What the matrix of a layer multiplies in a recurrent call with these arguments, for all steps in time.

    None where it cannot be told: of packed sequences, of a matrix that is computed or part of a parameter, of
    the projection of a hidden state.
    """
    position = _position(program, name, step)
    if position is None:
        return None
    tensors = [leaf for leaf in leaves_of(args) if isinstance(leaf, Tensor)]
    if step.key.op.endswith("_cell"):
        first_state = args[1] if isinstance(args[1], Tensor) else args[1][0]
        found = args[0] if tensors[position] is args[2] else first_state
        return LayerInputs(found.reshape(1, -1, found.shape[-1]))
    if not isinstance(args[3], bool):
        return None  # packed
    rows = _Recurrence(step.func, args).read_by(position - (len(tensors) - len(args[2])))
    return None if rows is None else LayerInputs(rows.reshape(1, -1, rows.shape[-1]))


def _position(program: Program, name: str, step: Step) -> int | None:
    """Where a layer's matrix is among the tensors of a call."""
    weight = program.weights[name]
    if weight.parameter is None or weight.region is not None:
        return None
    numbers = [leaf.number for leaf in leaves_of(step.args) if isinstance(leaf, Ref)]
    return numbers.index(program.stored[weight.parameter])


class _Recurrence:
    """A call of ``torch.lstm``, ``torch.gru`` or ``torch.rnn_tanh``, to be run layer by layer."""

    def __init__(self, func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        x, self.state, self.parameters, biases, layers, _, _, bidirectional, batch_first = args
        self.func = func
        self.x: Tensor = x.transpose(0, 1) if batch_first else x
        self.options = (biases, 1, 0.0, False, bidirectional, False)
        self.directions = 2 if bidirectional else 1
        self.each = len(self.parameters) // (layers * self.directions)  # of a layer and direction

    def read_by(self, parameter: int) -> Tensor | None:
        """(steps, batch, inputs): what the matrix of this number among all parameters multiplies."""
        number, which = divmod(parameter, self.each)
        layer, direction = divmod(number, self.directions)
        x = self.x
        for below in range(layer):
            x = self._run(below, x)
        if which == 0:
            return x
        if which != 1:
            return None
        made = self._run(layer, x).chunk(self.directions, dim=-1)[direction]
        first = (self.state if isinstance(self.state, Tensor) else self.state[0])[number][None]
        return torch.cat([made[1:], first] if direction else [first, made[:-1]])

    def _run(self, layer: int, x: Tensor) -> Tensor:
        """What a layer makes of all steps."""
        rows = slice(layer * self.directions, (layer + 1) * self.directions)
        whole = isinstance(self.state, Tensor)
        state = self.state[rows] if whole else tuple(part[rows] for part in self.state)
        own = slice(rows.start * self.each, rows.stop * self.each)
        made: Tensor = self.func(x, state, self.parameters[own], *self.options)[0]
        return made
