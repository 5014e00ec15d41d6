"""Models that torch exports otherwise than it runs them: the file computes what the model computes all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantkit
from quantkit.backends.onnxruntime.parity import DEFAULT_TOLERANCE, measure_parity, relative_error, require_parity
from quantkit.backends.onnxruntime.sessions import open_session, run_session
from quantkit.backends.onnxruntime.writer import export_onnx
from quantkit.errors import ParityError
from quantkit.simulation.model import SimulatedModel
from tests.backends.helpers import prepared, simulate

SAMPLES, TOKENS, WIDTH = 3, 6, 8


class Rows(nn.Module):
    """Rows over their root mean square, then two layers."""

    def __init__(self, epsilon: float, scale: float = 1.0) -> None:
        super().__init__()
        self.epsilon, self.scale = epsilon, scale
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon) * self.scale
        return self.two(F.relu(self.one(x)))


class Masked(nn.Module):
    """Attention under a mask, which, as in transformers, is left out where it masks nothing, but not while the model
    is exported; positions are then computed in more steps, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.places = nn.Embedding(16, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        positions, given = torch.arange(x.shape[1]), None
        if torch.compiler.is_exporting():
            positions = (positions + 1) + -1
        if torch.compiler.is_exporting() or not bool(mask.all()):
            given = mask[:, None, None, :].bool()
        q, k, v = self.inside(F.layer_norm(x + self.places(positions), (WIDTH,))).unsqueeze(1).chunk(3, -1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=given).squeeze(1)
        return self.outside(mixed + x)


def values(seed: int) -> Tensor:
    return torch.randn(SAMPLES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def simulated(model: nn.Module, *inputs: Tensor) -> SimulatedModel:
    batch = (inputs, {})
    return simulate(prepared(model.eval(), batch), batch, 8)


@pytest.mark.parametrize(("epsilon", "scale"), [(1e-8, 1.0), (1e-12, 1.0), (0.0, 1 + 5e-6)])
def test_constants_next_to_zero_and_one_are_kept(epsilon: float, scale: float, tmp_path: Path) -> None:
    """A row of zeros is what shows an addition of 1e-8."""
    torch.manual_seed(0)
    x, path = values(1), tmp_path / "m.onnx"
    if epsilon:
        x[0, 0] = 0
    model = simulated(Rows(epsilon, scale), x)
    export_onnx(model, ((x,), {}), path)
    found = run_session(open_session(path, optimized=False), ((x,), {}))[0]
    with torch.no_grad():
        assert relative_error(found, model(x).numpy()) < 1e-6


@pytest.mark.parametrize("masked", [True, False])
def test_a_mask_that_masks_nothing_and_positions_computed_in_more_steps(masked: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    mask = torch.ones(SAMPLES, TOKENS, dtype=torch.long)
    mask[1, 4:] = 0
    path = tmp_path / "m.onnx"
    model = simulated(Masked(), values(1), mask)
    export_onnx(model, ((values(1), mask), {}), path)
    seen = mask if masked else torch.ones_like(mask)
    found = run_session(open_session(path, optimized=False), ((values(2), seen), {}))[0]
    with torch.no_grad():
        assert relative_error(found, model(values(2), seen).numpy()) < 1e-5


class HugeMask(Masked):
    """Scores under a mask of the smallest finite number, beside zeros, and the order of what comes out."""

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.inside(x).chunk(3, -1)
        added = (1 - mask[:, None, :].float()) * torch.finfo(torch.float32).min
        scores = self.outside((q @ k.mT + added).softmax(-1) @ v)
        return scores, scores.argsort(-1)


def test_a_mask_of_huge_numbers_leaves_nothing_undecided(tmp_path: Path) -> None:
    """A wrong file is told from a right one under any mask."""
    torch.manual_seed(0)
    mask = torch.ones(SAMPLES, TOKENS, dtype=torch.long)
    mask[1, 4:] = 0
    batch, path = ((values(1), mask), {}), tmp_path / "m.onnx"
    model = simulated(HugeMask(), *batch[0])
    export_onnx(model, batch, path)
    with torch.no_grad():
        model.floats["inside"].mul_(-1)
    other = simulate(prepared(model.model, batch), batch, 8)
    found = measure_parity(path, other, [batch])
    assert not any(one.undecided for one in found if one.output == "output.0" and not one.optimized)
    with pytest.raises(ParityError, match="does not compute"):
        require_parity(found, DEFAULT_TOLERANCE)
    assert np.isfinite([one.relative_error for one in found]).all()


def test_a_fault_of_the_optimizer_leaves_the_graph_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As onnxscript's has where a tensor is split by sizes that vary."""

    def broken(self: Any) -> None:
        raise AttributeError("'NoneType' object has no attribute 'ndim'")

    monkeypatch.setattr(torch.onnx.ONNXProgram, "optimize", broken)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).eval()
    result = quantkit.quantize(model, "w8a8", torch.randn(8, 3, 6, 6), progress=False)
    report = result.export_onnx(tmp_path / "model.onnx")
    assert max(one.relative_error for one in report.parity) < 1e-3
