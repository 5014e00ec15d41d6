"""Files of LSTM, GRU and RNN take sequences of every length, and hold their weights as codes, once."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import quantkit
from tests.backends.test_dynamic_sizes import inputs_of, require_the_same
from tests.program.models import randn


class Recurrent(nn.Module):
    """A recurrence, and a head on its last state and the largest of its steps."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer, directions = layer, 2 if layer.bidirectional else 1
        self.head = nn.Linear(8 * (directions + 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        steps, state = self.layer(x if self.layer.batch_first else x.transpose(0, 1))
        last = (state[0] if isinstance(state, tuple) else state)[-1]
        return self.head(torch.cat([steps.amax(1 if self.layer.batch_first else 0), last], -1))


DEEP = {"num_layers": 2, "bidirectional": True}
CASES = {
    "lstm": (partial(nn.LSTM, batch_first=True), "w4"),
    "deep lstm": (partial(nn.LSTM, **DEEP), "w8a8"),
    "deep gru": (partial(nn.GRU, batch_first=True, **DEEP), "w4"),
    "gru without biases": (partial(nn.GRU, bias=False), "w8a8"),
    "deep rnn": (partial(nn.RNN, **DEEP), "w4"),
    "rnn with relu": (partial(nn.RNN, nonlinearity="relu", batch_first=True), "w8a8"),
}


@pytest.mark.parametrize("name", CASES)
def test_sequences_of_all_lengths(name: str, tmp_path: Path) -> None:
    build, scheme = CASES[name]
    torch.manual_seed(0)
    model = Recurrent(build(6, 8)).eval()
    calibration = [randn(6, steps, 6, seed=steps) for steps in (5, 9, 7)]
    rules = {"*": scheme}  # also where activations in float would be better
    result = quantkit.quantize(model, scheme, calibration, rounding="nearest", rules=rules, progress=False)
    report = result.export_onnx(tmp_path / "model.onnx")
    assert inputs_of(report.path) == {"x": ["batch", "sequence", 6]}
    require_the_same(result, report.path, randn(4, 3, 6, seed=1), randn(1, 20, 6, seed=2))

    tensors = onnx.load(report.path).graph.initializer
    floats = sum(math.prod(t.dims) for t in tensors if t.data_type == onnx.TensorProto.FLOAT)
    scales = sum(w.scale.numel() for w in result.quantized.weights.values())
    assert floats <= scales + sum(p.numel() for p in model.parameters() if p.dim() == 1) + 8
