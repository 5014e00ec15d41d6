"""Reparameterization from the request to the files: what is rewritten, what is left and why, what ships."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import quantkit
from quantkit.backends.onnxruntime.sessions import open_session
from quantkit.errors import InvalidRequest
from quantkit.numbers.logarithmic import LogRange
from quantkit.targets import Target
from quantkit.transforms.prepare import prepare

WIDTH = 16


class Transformer(nn.Module):
    """One pre-LayerNorm block with uneven channels behind its norms, and a head behind a third norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, WIDTH)
        self.norm1, self.norm2, self.norm = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.head = nn.Linear(WIDTH, 5)
        with torch.no_grad():
            for norm, readers in ((self.norm1, self.qkv), (self.norm2, self.fc1), (self.norm, self.head)):
                uneven = torch.logspace(-1, 1.5, WIDTH)[torch.randperm(WIDTH)]
                norm.weight.mul_(uneven)
                norm.bias.copy_(torch.randn(WIDTH) * uneven)
                readers.weight.div_(uneven)
            self.qkv.weight[: 2 * WIDTH].mul_(4)  # attention that prefers some tokens

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = self.qkv(self.norm1(x)).reshape(x.shape[0], -1, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(self.norm(x)[:, 0])


LAYERS = ("embed", "qkv", "proj", "fc1", "fc2", "head")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(5)
    return Transformer().eval()


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    return torch.randn(64, 7, 6, generator=torch.Generator().manual_seed(1))


def applied(model: nn.Module, inputs: Tensor, way: str, bits: str = "4", **options: object) -> quantkit.Result:
    plan = quantkit.Plan.of(dict.fromkeys(LAYERS, f"w8a{bits}"))
    settings: dict[str, object] = {"rounding": "nearest", "reconstruction": "none", "correction": None}
    return quantkit.apply(
        model, plan, inputs, reparameterization=way, transforms="none", progress=False, **settings | options
    )  # type: ignore[arg-type]


def damage(model: nn.Module, result: quantkit.Result, unseen: Tensor) -> float:
    with torch.no_grad():
        return float((result.model(unseen) - model(unseen)).square().mean())


@pytest.mark.parametrize("way", ["norm", "clip"])
def test_ranges_of_channels_save_a_network_with_uneven_channels(model: nn.Module, inputs: Tensor, way: str) -> None:
    unseen = torch.randn(256, 7, 6, generator=torch.Generator().manual_seed(2))
    plain, rewritten = applied(model, inputs, "none"), applied(model, inputs, way)
    assert damage(model, rewritten, unseen) < damage(model, plain, unseen) / 2
    notes = rewritten.notes["reparameterization"]
    assert set(notes) == {"norm1", "norm2", "norm"}
    assert all(note.startswith("error behind it 0.") for note in notes.values())
    assert "reparameterization" not in plain.notes


def test_the_users_model_stays_unless_inplace(model: nn.Module, inputs: Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    applied(model, inputs, "clip+softmax")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_inplace_gives_the_same_codes(model: nn.Module, inputs: Tensor) -> None:
    own = Transformer().eval()
    own.load_state_dict(model.state_dict())
    beside, inside = applied(model, inputs, "norm"), applied(own, inputs, "norm", inplace=True)
    assert inside.simulated().model is own
    for name, weight in beside.simulated().weights.items():
        assert torch.equal(weight.codes, inside.simulated().weights[name].codes)
    assert beside.simulated().ranges == inside.simulated().ranges


def with_log_codes(model: nn.Module, inputs: Tensor) -> quantkit.Result:
    schemes = dict.fromkeys(LAYERS, "w8a4")
    plan = replace(quantkit.Plan.of(schemes), sites={"/softmax": "alog4"})
    return quantkit.apply(model, plan, inputs, reconstruction="none", correction=None, progress=False)


def test_log_codes_reach_the_onnx_file_by_standard_operators(model: nn.Module, inputs: Tensor, tmp_path: Path) -> None:
    result = with_log_codes(model, inputs)
    assert isinstance(result.simulated().ranges["/softmax"], LogRange)
    assert result.plan.sites["/softmax"] == "alog4"
    report = result.export_onnx(tmp_path / "model.onnx")
    session = open_session(report.path, optimized=False)
    import onnx

    assert {node.domain for node in onnx.load(report.path).graph.node} <= {"", "quantkit"}
    unseen = torch.randn(256, 7, 6, generator=torch.Generator().manual_seed(3))
    found = session.run(None, {session.get_inputs()[0].name: unseen.numpy()})[0]
    with torch.no_grad():
        wanted = result.model(unseen).numpy()
    close = np.isclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max()).all(1)
    assert close.mean() > 0.9  # a code that falls the other way at a tie moves what comes after it


def test_log_codes_are_saved_and_loaded(model: nn.Module, inputs: Tensor, tmp_path: Path) -> None:
    result = with_log_codes(model, inputs)
    result.save(tmp_path)
    loaded = quantkit.load(tmp_path, model)
    assert loaded.simulated().ranges == result.simulated().ranges
    with torch.no_grad():
        assert torch.equal(loaded.model(inputs), result.model(inputs))


def test_log_codes_are_for_probabilities(model: nn.Module, inputs: Tensor) -> None:
    plan = replace(quantkit.Plan.of(dict.fromkeys(LAYERS, "w8a4")), sites={"qkv": "alog4"})
    with pytest.raises(InvalidRequest, match="'qkv' alog4"):
        quantkit.apply(model, plan, inputs, progress=False)


def test_digits_transformer_at_four_bits(repo: Path, tmp_path: Path) -> None:
    """On real data: fewer bits' damage with all parts than with plain ranges, the same answers in onnxruntime."""
    from recipes.models import digits_vit

    digits, float_model = np.load(repo / "calibration" / "digits.npz"), digits_vit.build()
    float_model.load_state_dict(load_file(repo / "calibration" / "digits_vit.safetensors"))
    seen = digits_vit.preprocess(digits["images"][digits["calibration"]])[:128]
    unseen = digits_vit.preprocess(digits["images"][digits["evaluation"]])[:300]
    ready = prepare(float_model, [((seen[:4],), {})], Target.load("onnxruntime-cpu"))
    schemes = quantkit.Plan.of(dict.fromkeys(ready.quantizable, "w4a4") | {"patch_embed": "w4a8"}).schemes
    sites = {site.name: "a4" for site in ready.sites if not site.consumers}
    plan = quantkit.Plan(schemes=schemes, sites=sites)
    found = {}
    for way, rounding in (("none", "nearest"), ("clip+softmax", "gptaq")):
        found[way] = quantkit.apply(
            float_model, plan, seen, reparameterization=way, rounding=rounding, reconstruction="none", correction=None,
            progress=False,
        )  # fmt: skip
    plain, whole = found["none"], found["clip+softmax"]
    assert damage(float_model, whole, unseen) < damage(float_model, plain, unseen)
    session = open_session(whole.export_onnx(tmp_path / "model.onnx").path, optimized=True)
    answers = session.run(None, {session.get_inputs()[0].name: unseen.numpy()})[0].argmax(-1)
    with torch.no_grad():
        assert (answers == whole.model(unseen).argmax(-1).numpy()).mean() >= 0.98


def test_unknown_names_are_refused(model: nn.Module, inputs: Tensor) -> None:
    with pytest.raises(InvalidRequest, match="Unknown reparameterization 'norms'; known: auto, none, norm, clip"):
        applied(model, inputs, "norms")
