"""Sites that a plan leaves float: simulated, counted, saved and written so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quantkit
from quantkit import Plan, Result
from quantkit.backends.onnxruntime.onnx_model import OnnxModel
from quantkit.backends.onnxruntime.sessions import open_session
from quantkit.errors import InvalidRequest
from quantkit.formats import Scheme
from tests.backends.helpers import operations_that_run
from tests.program.models import Net, randn
from tests.stages.networks import images, small

SUM = "/relu.1"  # the residual sum of the small network, behind its ReLU; a mean reads it, and no layer
LAYERS = ("stem.0", "conv", "mix", "head")
SCHEMES = {name: Scheme.parse("w8a8") for name in LAYERS}


def applied(model: nn.Module, plan: Plan, x: torch.Tensor) -> Result:
    return quantkit.apply(model, plan, x, rounding="nearest", reconstruction="none", correction=None, progress=False)


@pytest.fixture(scope="module")
def coded() -> Result:
    return applied(small(), Plan(SCHEMES), images())


@pytest.fixture(scope="module")
def floating() -> Result:
    return applied(small(), Plan(SCHEMES, sites={SUM: "float"}), images())


@pytest.fixture(scope="module")
def file(floating: Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return floating.export_onnx(tmp_path_factory.mktemp("float site") / "model.onnx").path


def test_the_plan_says_so_and_stores_no_range(coded: Result, floating: Result) -> None:
    assert coded.plan.sites[SUM] == "a8"
    assert floating.plan.sites == coded.plan.sites | {SUM: "float"}
    assert coded.plan.total_bytes - floating.plan.total_bytes == 6  # a scale, a zero point and the highest code
    assert coded.plan.size_bytes == floating.plan.size_bytes
    assert floating.quantized.ranges == {n: r for n, r in coded.quantized.ranges.items() if n != SUM}


def test_the_simulation_adds_in_float(coded: Result, floating: Result) -> None:
    """By hand: the network with codes everywhere but in the sum."""
    ranges, seen = coded.quantized.ranges, []

    def record(key, args, kwargs):
        if key.op == "mean":
            seen.append(args[0])

    with torch.no_grad():
        floating.quantized.run((images(),), {}, record)
        coded.quantized.run((images(),), {}, record)
    in_float, on_codes = seen
    assert torch.equal(ranges[SUM].fake_quantize(in_float), on_codes)
    assert not torch.equal(in_float, on_codes)


@pytest.mark.slow
def test_the_file_has_no_codes_there_and_computes_the_same(floating: Result, file: Path, tmp_path: Path) -> None:
    graph = onnx.load(file).graph
    assert not [t.name for t in graph.initializer if t.name.startswith(SUM)]
    quantized = {node.name for node in graph.node if node.op_type == "QuantizeLinear"}
    assert quantized == {f"{name}/QuantizeLinear" for name, fmt in floating.plan.sites.items() if fmt != "float"}
    ran = operations_that_run(file, tmp_path)
    assert ran.count("QLinearConv") == 3
    assert "QLinearAdd" not in ran
    assert "Add" in ran
    with torch.no_grad():
        wanted = floating.model(images())
    session = open_session(file, optimized=False)
    spelled = session.run(None, {session.get_inputs()[0].name: images().numpy()})[0]
    assert np.mean(np.abs(spelled - wanted.numpy()) > 1e-5) < 0.02
    assert torch.linalg.vector_norm(OnnxModel(file)(images()) - wanted) < 0.02 * torch.linalg.vector_norm(wanted)


def test_it_comes_back_and_runs_on_integers(floating: Result, tmp_path: Path) -> None:
    with torch.no_grad():
        wanted = floating.model(images())
        again = quantkit.load(floating.save(tmp_path), small())
        assert torch.equal(again.model(images()), wanted)
        real = floating.to_real().model(images())
    assert again.plan == floating.plan
    assert torch.linalg.vector_norm(real - wanted) < 0.02 * torch.linalg.vector_norm(wanted)


def test_applied_again_it_is_the_same_plan(floating: Result) -> None:
    again = applied(small(), floating.plan, images())
    assert again.plan == floating.plan


def test_in_place_it_is_the_same_model(floating: Result) -> None:
    model = small()
    made = quantkit.apply(
        model, floating.plan, images(), rounding="nearest", reconstruction="none", correction=None, progress=False,
        inplace=True,
    )  # fmt: skip
    assert made.plan == floating.plan
    assert SUM not in made.quantized.ranges


@pytest.mark.slow
def test_products_of_attention_in_float(tmp_path: Path) -> None:
    """Probabilities alone, then all operands."""
    torch.manual_seed(0)
    parts = {name: nn.Linear(8, 8) for name in "qkvo"}
    model = Net(
        lambda self, x: self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))), **parts
    ).eval()
    x, schemes = randn(16, 5, 8), {name: Scheme.parse("w8a8") for name in "qkvo"}
    for names in (["/softmax"], ["/softmax", "q", "k", "v"]):
        result = applied(model, Plan(schemes, sites=dict.fromkeys(names, "float")), x)
        left = {"input", "/matmul.1", "q", "k", "v"} - set(names)
        assert set(result.quantized.ranges) == left
        assert {name for name, fmt in result.plan.sites.items() if fmt != "float"} == left
        path = result.export_onnx(tmp_path / f"{len(names)}.onnx").path
        found = [node.op_type for node in onnx.load(path).graph.node].count("QuantizeLinear")
        assert found == len(left)


def test_where_a_layer_reads_codes_or_a_kernel_writes_them_it_is_refused() -> None:
    for name, message in {
        "/relu": "several formats of one tensor, '/relu': mix a8",
        "mix": "is a layer output",
    }.items():
        with pytest.raises(InvalidRequest, match=message):
            applied(small(), Plan(SCHEMES, sites={name: "float"}), images())
