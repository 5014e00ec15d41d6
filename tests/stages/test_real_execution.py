"""The switch between simulated and real execution: both agree on the reference networks, and files do not notice."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import quantkit
from quantkit.errors import InvalidRequest
from quantkit.runtime.real import RealModel
from tests.stages.networks import images, small

SCHEMES = {"stem.0": "w8a8", "conv": "w4a8", "mix": "w3a8", "head": "w8a8"}


@pytest.fixture(scope="module")
def result() -> quantkit.Result:
    return quantkit.apply(small(), SCHEMES, [images()], progress=False)


def test_a_real_result_runs_in_the_plans_bytes(result: quantkit.Result) -> None:
    real = result.to_real()
    assert isinstance(real.quantized, RealModel) and real.plan is result.plan
    assert real.quantized.weight_bytes == result.plan.size_bytes
    x = images(100, seed=5)
    with torch.no_grad():
        torch.testing.assert_close(real.model(x), result.model(x), atol=1e-2, rtol=1e-2)
    assert result.to_real(expand=True).quantized.expanded_bytes > 0


def test_load_chooses_the_execution(result: quantkit.Result, tmp_path: Path) -> None:
    result.save(tmp_path)
    real = quantkit.load(tmp_path, small(), execution="real")
    assert isinstance(real.quantized, RealModel)
    x = images(10, seed=5)
    assert torch.equal(real.model(x), result.to_real().model(x))
    assert quantkit.load(tmp_path, small()).quantized.ranges == result.quantized.ranges
    with pytest.raises(InvalidRequest, match=r"execution.*'fast'.*simulated.*real"):
        quantkit.load(tmp_path, small(), execution="fast")


def test_a_real_result_writes_the_files_of_the_simulated_one(result: quantkit.Result, tmp_path: Path) -> None:
    result.save(tmp_path / "simulated")
    result.to_real().save(tmp_path / "real")
    for name in ("plan.json", "weights.safetensors"):
        assert (tmp_path / "simulated" / name).read_bytes() == (tmp_path / "real" / name).read_bytes()


def loaded(name: str, weights: Path) -> nn.Module:
    model: nn.Module = import_module(f"recipes.models.{name}").build()
    model.load_state_dict(load_file(weights))
    return model


def digits(repo: Path) -> tuple[nn.Module, Tensor, Tensor, np.ndarray]:
    found = np.load(repo / "calibration" / "digits.npz")
    network = loaded("digits_cnn", repo / "calibration" / "digits_cnn.safetensors")
    inputs = import_module("recipes.models.digits_cnn").preprocess(found["images"])
    evaluation = found["evaluation"]
    return network, inputs[found["calibration"]][:64], inputs[evaluation], found["labels"][evaluation]


def check_agreement(model: nn.Module, calibration: Tensor, inputs: Tensor, labels: np.ndarray, scheme: str) -> None:
    """Both executions within 0.1 points on ``inputs`` (or one input), in the plan's bytes."""
    layers = {n: scheme for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    result = quantkit.apply(
        model, layers, list(calibration.split(32)), rounding="nearest", reconstruction="none", progress=False
    )
    real = result.to_real()
    assert real.quantized.weight_bytes == result.plan.size_bytes
    with torch.no_grad():
        right = [
            torch.cat([m(part) for part in inputs.split(250)]).argmax(1).numpy() == labels
            for m in (result.model, real.model)
        ]
    assert abs(int(right[0].sum()) - int(right[1].sum())) <= max(1, len(labels) // 1000)


@pytest.mark.parametrize("scheme", ["w4a8", "w3a8"])
def test_digits_agree(repo: Path, scheme: str) -> None:
    check_agreement(*digits(repo), scheme)


@pytest.mark.slow
def test_a_network_for_photographs_agrees(data_dir: Path) -> None:
    """1,000 images: a difference of one image is 0.1 points."""
    preprocess = import_module("recipes.models.resnet8").preprocess
    calibration = preprocess(np.load(data_dir / "cifar10_calib.npz")["images"][:64])
    test = np.load(data_dir / "cifar10_test_a.npz")
    inputs, labels = preprocess(test["images"][:1000]), test["labels"][:1000]
    network = loaded("resnet8", data_dir / "resnet8_mlperf.safetensors")
    check_agreement(network, calibration, inputs, labels, "w8a8")
