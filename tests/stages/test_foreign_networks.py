"""Networks not written for quantkit, unchanged, from a budget to onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import quantkit
from quantkit.backends.onnxruntime.sessions import open_session
from quantkit.backends.onnxruntime.writer import ExportReport, export_float
from quantkit.stages.result import Result
from tests.program.models import randn, settled
from tests.stages.networks import (
    ComputedWeights,
    ConstantBranch,
    ConvReused,
    FunctionalReLU,
    ImageAndFeatures,
    MobileNet,
)


def pictures(count: int, seed: int) -> Tensor:
    return randn(count, 3, 8, 8, seed=seed)


def pictures_and_features(count: int, seed: int) -> dict[str, Tensor]:
    return {"image": pictures(count, seed), "features": randn(count, 5, seed=seed + 100)}


pytestmark = pytest.mark.slow  # exports take about a second each, the first of a process three

Make = Callable[[int, int], Any]
NETWORKS: dict[str, tuple[type[nn.Module], Make]] = {
    "MobileNet block with Hardswish": (MobileNet, pictures),
    "functional ReLU, in place too": (FunctionalReLU, pictures),
    "two inputs, dict output": (ImageAndFeatures, pictures_and_features),
    "convolution used twice": (ConvReused, pictures),
    "computed weights": (ComputedWeights, pictures),
    "a layer that reads a constant": (ConstantBranch, pictures),
}


def hooks_of(network: nn.Module) -> list[int]:
    """How many hooks each module has: weight norm of old is one."""
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules()]


@dataclass(frozen=True)
class Case:
    network: nn.Module
    before: dict[str, Tensor]
    hooks: list[int]
    inputs: Make
    result: Result
    report: ExportReport

    def in_torch(self, count: int) -> dict[str, np.ndarray]:
        inputs = self.inputs(count, 50)
        with torch.no_grad():
            found = self.result.model(**inputs) if isinstance(inputs, dict) else self.result.model(inputs)
        return {k: v.numpy() for k, v in (found if isinstance(found, dict) else {"output": found}).items()}

    def in_onnxruntime(self, count: int) -> dict[str, np.ndarray]:
        inputs = self.inputs(count, 50)
        session = open_session(self.report.path, threads=1)
        named = inputs if isinstance(inputs, dict) else {session.get_inputs()[0].name: inputs}
        found = session.run(None, {name: tensor.numpy() for name, tensor in named.items()})
        return dict(zip([output.name for output in session.get_outputs()], found, strict=True))


@pytest.fixture(params=NETWORKS, scope="module")
def case(request, tmp_path_factory) -> Case:
    build, inputs = NETWORKS[request.param]
    torch.manual_seed(0)
    network = settled(build())
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    hooks = hooks_of(network)
    result = quantkit.quantize(network, "4 bits", [inputs(16, 1), inputs(16, 2)], progress=False)
    path: Path = tmp_path_factory.mktemp("foreign") / "model.onnx"
    return Case(network, before, hooks, inputs, result, result.export_onnx(path))


def test_every_layer_is_quantized_inside_the_budget(case: Case) -> None:
    assert not any(scheme.is_float for scheme in case.result.plan.schemes.values())
    assert case.result.plan.average_bits <= 4
    assert case.report.weight_bytes == case.result.plan.size_bytes


def test_the_network_itself_is_untouched(case: Case) -> None:
    assert all(torch.equal(tensor, case.before[name]) for name, tensor in case.network.state_dict().items())
    assert hooks_of(case.network) == case.hooks


@pytest.mark.parametrize("count", [1, 7, 40])
def test_onnxruntime_computes_what_the_result_computes_at_any_batch_size(case: Case, count: int) -> None:
    assert case.report.dynamic_batch
    expected, found = case.in_torch(count), case.in_onnxruntime(count)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].shape == values.shape
        error = np.linalg.norm(found[name] - values) / np.linalg.norm(values)
        assert error < 0.05, f"{name} differs by {error:.1%}"
        assert np.mean(found[name].argmax(-1) == values.argmax(-1)) >= 0.9


def test_four_bits_are_close_to_the_float_network(case: Case) -> None:
    inputs = case.inputs(40, 50)
    with torch.no_grad():
        floats = case.network(**inputs) if isinstance(inputs, dict) else case.network(inputs)
    wanted = (floats["logits"] if isinstance(floats, dict) else floats).numpy()
    found = case.in_torch(40)["logits" if isinstance(floats, dict) else "output"]
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.3


@pytest.mark.parametrize("case", ["MobileNet block with Hardswish"], indirect=True)
def test_the_file_is_smaller_than_the_float_one(case: Case, tmp_path: Path) -> None:
    """Of a network whose weights outweigh the description of its graph."""
    floating = export_float(case.result.quantized, case.result.example(), tmp_path / "float.onnx")
    assert case.report.file_bytes == case.report.path.stat().st_size
    assert case.report.file_bytes < 0.5 * floating.stat().st_size
