"""Outputs that are constants, masked by infinities, empty, or no numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import quantkit
from quantkit.backends.onnxruntime.parity import relative_error
from quantkit.backends.onnxruntime.sessions import open_session
from quantkit.errors import InvalidRequest
from tests.program.models import Net, randn

X = randn(32, 8)


def network(forward) -> nn.Module:
    model = Net(forward, inner=nn.Linear(8, 8), head=nn.Linear(8, 4))
    model.register_buffer("anchors", randn(7, 4))
    return model.eval()


def logits(self, x):
    return self.head(self.inner(x).relu())


def applied(forward) -> quantkit.Result:
    return quantkit.quantize(network(forward), "w8a8", X, progress=False)


OUTPUTS = {
    "a buffer": lambda self, x: (logits(self, x), self.anchors),
    "a parameter": lambda self, x: (logits(self, x), self.head.bias),
    "a constant": lambda self, x: (logits(self, x), torch.arange(4.0)),
    "computed from constants": lambda self, x: {"logits": logits(self, x), "scale": self.anchors.mean()},
    "masked logits": lambda self, x: logits(self, x) + torch.tensor([0.0, 0.0, -torch.inf, -torch.inf]),
    "logits masked by an input": lambda self, x: logits(self, x).masked_fill(x[:, :4] > 1, -torch.inf),
    "nothing": lambda self, x: (logits(self, x), x[:, :0]),
}


@pytest.mark.parametrize("forward", OUTPUTS.values(), ids=OUTPUTS)
def test_files_return_what_the_model_returns(forward, tmp_path: Path) -> None:
    result = applied(forward)
    path = result.export_onnx(tmp_path / "model.onnx").path
    session = open_session(path, optimized=False)
    found = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    with torch.no_grad():
        returned = result.model(X)
    wanted = (
        returned.values() if isinstance(returned, dict) else returned if isinstance(returned, tuple) else [returned]
    )
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other.detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(
    "forward", [lambda self, x: logits(self, x) * torch.nan, lambda self, x: (logits(self, x) - 9).log()]
)
def test_outputs_that_are_no_numbers_are_refused_at_once(forward) -> None:
    with pytest.raises(InvalidRequest, match="returns NaN on calibration inputs"):
        applied(forward)


def test_errors_beside_infinities() -> None:
    wanted = np.array([1.0, -np.inf, 2.0], np.float32)
    assert relative_error(wanted, wanted) == 0
    assert relative_error(np.array([1.0, -np.inf, 2.5], np.float32), wanted) == pytest.approx(0.5 / 5**0.5)
    assert relative_error(np.array([1.0, 0.0, 2.0], np.float32), wanted) == np.inf
    assert relative_error(np.array([-np.inf, -np.inf, 2.0], np.float32), wanted) == np.inf
    assert relative_error(np.array([np.nan, -np.inf, 2.0], np.float32), wanted) == np.inf
    assert relative_error(wanted[:0], wanted[:0]) == 0
