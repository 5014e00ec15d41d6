"""LSTM, GRU and RNN over sequences whose length varies, as ONNX's own operators.

To know the shapes of what such a call makes, torch.export runs torch's loop over the steps, and so counts them: the
file would take sequences as long as the example's and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import SymInt, Tensor
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class _Operator:
    """An operator of ONNX, the places of its gates among torch's, and the activation that it has to be told."""

    name: str
    gates: tuple[int, ...]
    activation: str = ""

    def attributes(self, hidden: int, directions: int) -> dict[str, Any]:
        found: dict[str, Any] = {"hidden_size": hidden, "direction": ("forward", "bidirectional")[directions - 1]}
        if self.name == "GRU":
            found["linear_before_reset"] = 1  # as torch and cuDNN have it
        if self.activation:
            found["activations"] = [self.activation] * directions
        return found

    def reordered(self, tensor: Tensor) -> Tensor:
        """A weight or bias of torch with its gates in ONNX's order."""
        size = tensor.shape[0] // len(self.gates)
        parts = [tensor[gate * size : (gate + 1) * size] for gate in self.gates]
        return torch.cat(parts) if len(parts) > 1 else tensor


# torch: input, forget, cell, output; reset, update, new. ONNX: input, output, forget, cell; update, reset, hidden.
_OPERATORS = {
    "lstm": _Operator("LSTM", (0, 3, 1, 2)),
    "gru": _Operator("GRU", (1, 0, 2)),
    "rnn_tanh": _Operator("RNN", (0,), "Tanh"),
    "rnn_relu": _Operator("RNN", (0,), "Relu"),
}


class Recurrences(TorchFunctionMode):
    """Writes recurrences over a length that varies as operators of ONNX while a model is exported."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        operator = _OPERATORS.get(getattr(func, "__name__", ""))
        if operator is not None and len(args) == len(_Call._fields) and (call := _Call(*args)).can_be_written:
            return call.written(operator)
        return func(*args, **(kwargs or {}))


class _Call(NamedTuple):
    """The arguments of ``torch.lstm``, ``torch.gru`` and their like, ``state`` a tensor or a pair of them."""

    x: Tensor
    state: Any
    parameters: Any
    biases: Any
    layers: int
    dropout: float
    training: bool
    bidirectional: bool
    batch_first: bool

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def can_be_written(self) -> bool:
        """Whether the length varies, and ONNX has such a call: it has none of packed sequences and of projections."""
        if not isinstance(self.biases, bool):  # packed
            return False
        plain = len(self.parameters) == (4 if self.biases else 2) * self.layers * self.directions
        return plain and isinstance(self.x.shape[1 if self.batch_first else 0], SymInt)

    def written(self, operator: _Operator) -> tuple[Tensor, ...]:
        """What torch returns: all steps, and the states behind the last one."""
        x = self.x.transpose(0, 1) if self.batch_first else self.x
        states = (self.state,) if isinstance(self.state, Tensor) else self.state
        each, last = len(self.parameters) // (self.layers * self.directions), []
        for layer in range(self.layers):
            rows = range(layer * self.directions, (layer + 1) * self.directions)
            own = [self.parameters[row * each : (row + 1) * each] for row in rows]
            x, *ends = _layer(operator, x, [state[rows.start : rows.stop] for state in states], own)
            last.append(ends)
        return (x.transpose(0, 1) if self.batch_first else x, *map(torch.cat, zip(*last, strict=True)))


def _layer(
    operator: _Operator, x: Tensor, states: Sequence[Tensor], parameters: Sequence[Sequence[Tensor]]
) -> tuple[Tensor, ...]:
    """(steps, samples, directions * hidden) of a layer, and its states behind the last step, given the ``parameters``
    of each direction.
    """
    (steps, samples, _), directions, hidden = x.shape, len(parameters), states[0].shape[-1]
    turned = [[operator.reordered(tensor) for tensor in own] for own in parameters]
    inner, outer = (torch.stack([own[i] for own in turned]) for i in range(2))
    bias = torch.stack([torch.cat(own[2:]) for own in turned]) if len(turned[0]) > 2 else None
    made = torch.onnx.ops.symbolic_multi_out(
        f"::{operator.name}",
        (x, inner, outer, bias, None, *states),  # None: all sequences are as long
        operator.attributes(hidden, directions),
        dtypes=[x.dtype] * (1 + len(states)),
        shapes=[(steps, directions, samples, hidden), *((directions, samples, hidden) for _ in states)],
    )
    return made[0].transpose(1, 2).flatten(2), *made[1:]
