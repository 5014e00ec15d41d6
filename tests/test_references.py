"""The reference networks load, and compute what is said about them."""

from __future__ import annotations

import hashlib
import re
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

CALIBRATION = Path(__file__).resolve().parent.parent / "calibration"
README = (CALIBRATION / "README.md").read_text()
FILES = re.findall(r"^\| `([\w.]+)` \| ([\d,]+) \| `([0-9a-f]{64})` \|$", README, re.MULTILINE)


def loaded(name: str, weights: Path) -> nn.Module:
    """The module of recipes/models with these weights, every name accounted for."""
    model: nn.Module = import_module(f"recipes.models.{name}").build()
    model.load_state_dict(load_file(weights), strict=True)
    assert not model.training
    return model


def logits(name: str, model: nn.Module, images: np.ndarray) -> np.ndarray:
    """What the model makes of raw images."""
    with torch.no_grad():
        outputs: torch.Tensor = model(import_module(f"recipes.models.{name}").preprocess(images))
    return outputs.numpy()


def test_calibration_files_are_the_ones_described() -> None:
    assert {name for name, _, _ in FILES} == {path.name for path in CALIBRATION.iterdir()} - {"README.md"}
    for name, size, sha256 in FILES:
        content = (CALIBRATION / name).read_bytes()
        assert len(content) == int(size.replace(",", ""))
        assert hashlib.sha256(content).hexdigest() == sha256


def test_digits_are_split_without_overlap() -> None:
    digits = np.load(CALIBRATION / "digits.npz")
    assert digits["images"].shape == (1797, 8, 8)
    assert (digits["images"].min(), digits["images"].max()) == (0, 16)
    assert np.intersect1d(digits["calibration"], digits["evaluation"]).size == 0
    assert len(np.unique(digits["calibration"])) == 512
    assert np.bincount(digits["labels"][digits["evaluation"]]).min() >= 55


@pytest.mark.parametrize(
    ("name", "said", "least"),
    [("digits_cnn", "600 evaluation images", 0.985), ("digits_vit", "Accuracy of the transformer", 0.97)],
)
def test_digits_references_reach_their_stated_accuracy(name: str, said: str, least: float) -> None:
    digits = np.load(CALIBRATION / "digits.npz")
    model = loaded(name, CALIBRATION / f"{name}.safetensors")
    evaluation = digits["evaluation"]
    right = logits(name, model, digits["images"][evaluation]).argmax(1) == digits["labels"][evaluation]
    assert f"{said}: {100 * right.mean():.2f} %" in README
    assert right.mean() >= least


def test_calibration_files_are_small() -> None:
    assert sum(path.stat().st_size for path in CALIBRATION.iterdir()) < 1_000_000


@pytest.mark.parametrize(
    ("name", "weights", "least", "most"),
    [
        ("resnet20", "resnet20.safetensors", 0.90, 0.95),
        ("resnet8", "resnet8_mlperf.safetensors", 0.84, 0.91),
        ("vit_hybrid", "vit_hybrid_cifar10.safetensors", 0.78, 0.85),
    ],
)
def test_cifar_networks_load_and_classify(data_dir: Path, name: str, weights: str, least: float, most: float) -> None:
    """On all 5,000 images they reach 92.08, 87.90 and 81.34 %; a few hundred tell a wrong architecture as well."""
    images = np.load(data_dir / "cifar10_test_a.npz")
    model = loaded(name, data_dir / weights)
    right = logits(name, model, images["images"][:500]).argmax(1) == images["labels"][:500]
    assert least <= right.mean() <= most


def test_mobilenetv1_computes_the_published_logits(data_dir: Path) -> None:
    images = np.load(data_dir / "vww_images.npz")
    model = loaded("mobilenetv1", data_dir / "mobilenetv1_025_vww.safetensors")
    np.testing.assert_allclose(
        logits("mobilenetv1", model, images["eval"][:32]), images["fp32_logits_eval"][:32], atol=1e-4
    )
