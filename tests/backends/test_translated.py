"""Errors of the exporter and of onnxruntime in words, and what a file freezes or runs in float is said."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quantkit.backends.onnxruntime.marks import mark_graph
from quantkit.backends.onnxruntime.run_in_float import layers_in_float
from quantkit.backends.onnxruntime.sessions import open_session, run_session
from quantkit.backends.onnxruntime.translated import export_advice, first_line
from quantkit.backends.onnxruntime.writer import export_float, export_onnx
from quantkit.errors import InvalidRequest, QuantkitError
from quantkit.simulation.model import SimulatedModel
from tests.backends.helpers import prepared, simulate
from tests.program.models import randn


def test_the_first_line_has_no_terminal_codes() -> None:
    assert (
        first_line(RuntimeError("\x1b[1;31mno kernel\x1b[m for Foo\ngraph():\n  ..."))
        == "RuntimeError: no kernel for Foo"
    )
    assert first_line(ValueError()) == "ValueError"
    assert len(first_line(ValueError("x" * 5000))) < 250


def test_advice_goes_by_the_whole_chain() -> None:
    inner = RuntimeError("No ONNX function found for <OpOverload(op='aten.foo', overload='default')>.")
    try:
        raise RuntimeError("Failed to convert the exported program.") from inner
    except RuntimeError as error:
        assert export_advice(error).startswith("ONNX has no form for aten.foo. Write it with other operations")
    assert "torch.where" in export_advice(ValueError("Could not guard on data-dependent expression Eq(u0, 1)"))


class Bessel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(self.a(x))


class Loop(Bessel):
    """As many products as a value says."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        for _ in range(int(y.abs().max()) + 1):
            y = y * 0.5
        return y


class Largest(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x):
        return self.layer(x) / x.amax()


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        (Largest, r"ONNX's form of aten\.amax wants 'dim'"),
        (Bessel, "ONNX has no form for prims.bessel_j0"),
        (Loop, "by the values of tensors.*where"),
    ],
)
def test_what_cannot_be_exported_is_advised_on(kind: type[nn.Module], advice: str, tmp_path: Path) -> None:
    batch = ((randn(4, 6),), {})
    with pytest.raises(InvalidRequest, match=rf"cannot be exported to ONNX\. .*{advice}") as caught:
        export_onnx(SimulatedModel(kind().eval(), (), {}, {}), batch, tmp_path / "no.onnx")
    assert caught.value.__cause__ is not None
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x):
        return self.layer(x) if x.mean() > 0.5 else self.layer(2 * x)


def test_the_graph_as_far_as_it_got_is_for_debugging(tmp_path: Path, capfd, caplog) -> None:
    with caplog.at_level(logging.DEBUG, "quantkit"), pytest.raises(InvalidRequest, match=r"use torch\.where"):
        export_onnx(SimulatedModel(Branch().eval(), (), {}, {}), ((randn(4, 6),), {}), tmp_path / "no.onnx")
    assert "aten" not in capfd.readouterr().err
    assert any("torch.ops.aten" in record.getMessage() for record in caplog.records if record.levelname == "DEBUG")


def test_onnxruntime_is_quoted_in_a_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no file")
    with pytest.raises(QuantkitError, match=r"onnxruntime [\d.]+ cannot load broken\.onnx: InvalidProtobuf: .*report"):
        open_session(broken)
    batch = ((randn(4, 6),), {})
    path = export_float(SimulatedModel(nn.Sequential(nn.Linear(6, 4)), (), {}, {}), batch, tmp_path / "m.onnx")
    with pytest.raises(InvalidRequest, match=r"stopped on inputs of shape \(4, 5\); the file takes .*6\]"):
        run_session(open_session(path), ((randn(4, 5),), {}))


class Running(nn.Module):
    """Subtracts a mean that every call moves on."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 4)
        self.register_buffer("mean", torch.zeros(1, 6))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0, keepdim=True)
        return self.a(x - self.mean)


class Counting(Running):
    def forward(self, x: Tensor) -> Tensor:
        self.mean += 1
        return self.a(x + self.mean)


@pytest.mark.parametrize("kind", [Running, Counting])
def test_state_that_a_file_freezes_is_said(kind: type[nn.Module], caplog) -> None:
    batch = ((randn(4, 6),), {})
    ready = prepared(kind().eval(), batch)
    with caplog.at_level(logging.INFO, "quantkit"):
        mark_graph(ready.float_model(), batch)
    assert "forward updates mean: the file holds the values" in caplog.text


def test_layers_that_run_in_float_are_named(tmp_path: Path) -> None:
    batch = ((randn(8, 6),), {})
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    simulated = simulate(prepared(model.eval(), batch), batch, 8)
    report = export_onnx(simulated, batch, tmp_path / "m.onnx")
    assert report.layers_in_float == ()
    floating = export_float(simulated, batch, tmp_path / "float.onnx")
    optimized = tmp_path / "optimized.onnx"
    open_session(floating, save_optimized=optimized)
    assert layers_in_float(optimized, simulated) == ("0", "2")
    open_session(report.path, save_optimized=optimized)
    assert layers_in_float(optimized, simulated) == ()
