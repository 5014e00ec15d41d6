"""A model in half precision is prepared, quantized and saved as the float32 model with the same weights is."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

import quantkit
from quantkit.formats import Scheme
from quantkit.program.halves import is_half
from quantkit.program.outputs import results_of
from quantkit.program.replayable import replayable
from quantkit.rounding.weights import quantize_weight
from quantkit.runtime.real import RealModel
from quantkit.simulation.model import SimulatedModel
from quantkit.targets import Target
from quantkit.transforms.prepare import Prepared, prepare
from tests.program.architectures import ARCHITECTURES

TARGET = Target.load("onnxruntime-cpu")
W8 = Scheme.parse("w8").weight
NAMES = (
    "bert", "llama_padded", "mixtral_eager", "whisper_encoder", "vit", "swin", "multihead_attention",
    "transformer_encoder_padded", "weight_standardized_resnet", "lora_merged_in_forward", "bare_parameters",
    "experts_gathered", "embedding_bag_recommender", "transposed_unet", "running_state", "gru", "cells_over_time",
    "weight_norm_by_hook", "spectral_norm_parametrized",
)  # fmt: skip


def simulated_at_8_bits(ready: Prepared) -> SimulatedModel:
    """The prepared model with codes for all its layers, whatever the target can run."""
    floats = ready.weights
    codes = {
        name: quantize_weight(floats[name], [W8], None, weight.groups, "nearest").weights[W8]
        for name, weight in floats.layers.items()
    }
    return SimulatedModel(ready.model, (), codes, {}, floats, ready.program.updated)


def outputs_of(model: nn.Module, batch) -> list[Tensor]:
    with torch.no_grad():
        return [x.clone() for x in results_of(model(*batch[0], **batch[1]))]


@pytest.mark.parametrize("name", NAMES)
def test_the_zoo_in_bf16_is_its_float32_twin(name):
    entry = ARCHITECTURES[name]
    batch = entry.batch(2, None, 0)
    own = prepare(entry.build().bfloat16(), [batch], TARGET)
    twin = prepare(entry.build().bfloat16().float(), [batch], TARGET)

    assert own.program.weights.keys() == twin.program.weights.keys()
    assert own.sites == twin.sites
    assert {n: x.reason for n, x in own.layers.items()} == {n: x.reason for n, x in twin.layers.items()}
    wanted = outputs_of(twin.float_model(), batch)
    # the twin's attention is one kernel, that of the half model several calls
    torch.testing.assert_close(outputs_of(own.float_model(), batch), wanted, rtol=1e-5, atol=1e-5)
    program = replayable(own.program, own.model, batch, [])
    assert (program is None) == (replayable(twin.program, twin.model, batch, []) is None)

    before = {n: x.clone() for n, x in own.model.state_dict().items() if is_half(x)}
    quantized = simulated_at_8_bits(own)
    found = outputs_of(quantized, batch)
    torch.testing.assert_close(found, outputs_of(simulated_at_8_bits(twin), batch), rtol=1e-5, atol=1e-5)
    assert not all(map(torch.equal, found, wanted))
    after = quantized.model.state_dict()
    assert all(torch.equal(after[n], x) and after[n].dtype == x.dtype for n, x in before.items())

    real = RealModel(quantized)
    for other in (real, real.simulated(), quantized.in_float32()):
        torch.testing.assert_close(outputs_of(other, batch), found, rtol=1e-5, atol=1e-5)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.hidden, self.head = nn.Linear(8 * 6 * 6, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        return self.head(self.hidden(x.flatten(1)).relu())


@pytest.fixture(scope="module")
def pair() -> tuple[Small, Small]:
    torch.manual_seed(0)
    own = Small().eval()
    own.norm.running_mean.normal_()
    own.bfloat16()
    twin = Small().eval()
    twin.load_state_dict(own.state_dict())
    return own, twin


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(80, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def applied(model: nn.Module, images: Tensor, **how):
    plan = dict.fromkeys(("conv", "hidden", "head"), "w3a8")
    return quantkit.apply(model, plan, images, progress=False, **how)


@pytest.mark.parametrize("reconstruction", ("none", "network", "block", "adaquant"))
def test_codes_are_those_of_the_twin(pair, images, reconstruction):
    own, twin = (applied(model, images, reconstruction=reconstruction).simulated() for model in pair)
    for name, weight in twin.weights.items():
        assert torch.equal(own.weights[name].codes, weight.codes)
        assert torch.equal(own.weights[name].scale, weight.scale)
    assert own.ranges == twin.ranges
    assert torch.equal(own(images), twin(images))
    assert own.model.hidden.weight.dtype == torch.bfloat16
    assert pair[0].hidden.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("sensitivity", ("gram", "fisher", "hessian-trace", "hessian-eigenvalue"))
def test_profiles_are_those_of_the_twin(pair, images, sensitivity):
    own, twin = (
        quantkit.profile(model, images, schemes=["w4a8", "w2a8"], sensitivity=sensitivity, progress=False)
        for model in pair
    )
    torch.testing.assert_close(torch.from_numpy(own.damage), torch.from_numpy(twin.damage), rtol=1e-6, atol=0)
    assert own.float32_bytes == twin.float32_bytes
    assert own.layers["hidden"].float_bytes * 2 == twin.layers["hidden"].float_bytes


def test_a_saved_model_comes_back_on_an_architecture_of_any_type(pair, images, tmp_path):
    result = quantkit.apply(pair[0], {"conv": "w4a8", "head": "w4a8"}, images, progress=False, reconstruction="none")
    result.save(tmp_path)
    for model in pair:
        loaded = quantkit.load(tmp_path, model)
        assert torch.equal(loaded.model(images), result.model(images))
        assert loaded.quantized.model.hidden.weight.dtype == torch.bfloat16


def test_a_graph_is_exported_in_float32(pair, images, tmp_path):
    sizes = [applied(m, images, reconstruction="none").export_onnx(tmp_path / "m.onnx").file_bytes for m in pair]
    assert sizes[0] == sizes[1]


def test_no_float32_copy_of_a_weight_is_alive_once_prepared_and_simulated():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(37, 41), nn.ReLU(), nn.Linear(41, 43), nn.ReLU(), nn.Linear(43, 47)).bfloat16()
    batch = (torch.randn(4, 37),), {}
    shapes = {tuple(p.shape) for p in model.parameters() if p.dim() == 2}
    ready = prepare(model, [batch], TARGET)
    quantized = simulated_at_8_bits(ready)
    quantized(*batch[0])
    gc.collect()
    plain = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter)]
    tensors = [x for x in plain if x.dtype == torch.float32]
    assert not [x.shape for x in tensors if tuple(x.shape) in shapes]


def test_generation_is_that_of_the_twin():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=60,
    )  # fmt: skip
    own = transformers.LlamaForCausalLM(config).bfloat16().eval()
    twin = transformers.LlamaForCausalLM(config).eval()
    twin.load_state_dict(own.state_dict())
    tokens = torch.randint(0, 60, (4, 7), generator=torch.Generator().manual_seed(0))
    plan = {name: "w4" for name, m in own.named_modules() if isinstance(m, nn.Linear)}
    results = [
        quantkit.apply(model, plan, [{"input_ids": tokens}], progress=False, reconstruction="none")
        for model in (own, twin)
    ]
    for real in (False, True):
        models = [(r.to_real() if real else r).model for r in results]
        found, wanted = (m.generate(tokens[:1], max_new_tokens=6, do_sample=False) for m in models)
        assert torch.equal(found, wanted)


class ComparesTypes(nn.Module):
    """Code that refuses float32 in a model in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.dtype != self.second.weight.dtype:
            raise TypeError(f"expected {self.second.weight.dtype}")
        return self.second(x)


def test_a_model_that_compares_types_is_widened_as_a_whole():
    torch.manual_seed(0)
    ready = prepare(ComparesTypes().bfloat16(), [((torch.randn(4, 8),), {})], TARGET)
    assert not any(is_half(p) for p in ready.model.parameters())
