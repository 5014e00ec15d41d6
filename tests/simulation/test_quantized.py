"""``result.model`` is the user's model: whatever of it is called computes quantized, from any thread, and nothing is
hidden or left changed.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantkit
from quantkit import Result
from quantkit.program.sites import Site
from quantkit.targets import Target
from tests.program.architectures import ARCHITECTURES
from tests.program.models import randn
from tests.stages.networks import small


def quantized(model: nn.Module, calibration: Any, scheme: str = "w8a8", **options: Any) -> Result:
    """Every layer that can be, by this scheme; nothing learned."""
    kinds = (nn.Linear, nn.Conv2d)
    plan = dict.fromkeys([name for name, module in model.named_modules() if isinstance(module, kinds)], scheme)
    plain = {"reconstruction": "none", "correction": None, "reparameterization": "none", "progress": False}
    return quantkit.apply(model, plan, calibration, **(plain | options))


class Tagger(nn.Module):
    """An encoder and a head, with methods of its own, and attributes named as a wrapper's might be."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 8))
        self.heads = nn.ModuleDict({"one": nn.Linear(8, 3), "two": nn.Linear(8, 2)})
        self.weights = {"one": 1.0, "two": 0.5}
        self.ranges, self.sites, self.floats, self.updated = [1, 2], ("here",), "floats", ()
        self.model = nn.Linear(8, 3)
        self.threshold = 0.5

    def encode(self, x: Tensor, twice: bool = False) -> Tensor:
        x = self.encoder(x)
        return torch.tanh(x) * (2 if twice else 1)

    def set_weight(self, name: str) -> str:
        return f"weight {name}"

    def run(self, x: Tensor) -> Tensor:
        return self(x)["one"]

    @property
    def size(self) -> int:
        return len(self.heads)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        code = self.encode(x)
        return {name: head(code) * self.weights[name] for name, head in self.heads.items()} | {"m": self.model(code)}


@cache
def tagger() -> tuple[nn.Module, Result]:
    torch.manual_seed(0)
    model = Tagger().eval()
    return model, quantized(model, randn(32, 6))


def sites_of(result: Result) -> list[tuple[Site, Any]]:
    state = result.simulated()
    return [(site, state.ranges[site.name]) for site in state.sites]


def by_hand(result: Result, x: Tensor) -> Tensor:
    """The encoder with the tensors at sites quantized one by one: the slow twin of what is intercepted."""
    site = {name: found for site, found in sites_of(result) for name in site.consumers}
    for position, module in enumerate(result.simulated().model.encoder):
        if isinstance(module, nn.Linear):
            x = site[f"encoder.{position}"].fake_quantize(x)
        x = module(x)
    return x


@pytest.mark.parametrize("name", ["weights", "ranges", "sites", "floats", "updated", "threshold", "size"])
def test_attributes_of_the_user_are_not_hidden(name: str) -> None:
    model, result = tagger()
    for found in (result.model, result.to_real().model):
        assert getattr(found, name) == getattr(model, name)
        assert name in dir(found)
    assert result.model.set_weight("x") == "weight x"
    assert result.model.model.in_features == 8
    with pytest.raises(AttributeError, match="nothing_like_it"):
        result.model.nothing_like_it  # noqa: B018


def test_what_is_set_is_set_on_the_users_model() -> None:
    result = quantized(tagger()[0], randn(32, 6))
    x = randn(4, 6, seed=9)
    before = result.model(x)["one"]
    result.model.weights = {"one": 3.0, "two": 0.5}
    torch.testing.assert_close(result.model(x)["one"], 3 * before)
    assert result.simulated().model.weights["one"] == 3.0
    assert tagger()[0].weights["one"] == 1.0


def test_methods_and_submodules_compute_quantized() -> None:
    _, result = tagger()
    x = randn(7, 6, seed=9)
    wanted = by_hand(result, x)
    with torch.no_grad():
        weights_alone = result.simulated().model.encoder(x)
    assert not torch.allclose(wanted, weights_alone, atol=1e-5)

    for found in (result.model.encoder(x), result.model.encoder.forward(x)):
        torch.testing.assert_close(found, wanted)
    code = next(state for site, state in sites_of(result) if "heads.one" in site.consumers)
    torch.testing.assert_close(result.model.encode(x), code.fake_quantize(torch.tanh(wanted)))
    torch.testing.assert_close(result.model.encode(x, twice=True), code.fake_quantize(2 * torch.tanh(wanted)))
    torch.testing.assert_close(result.model.run(x), result.model(x)["one"])
    assert torch.equal(result.model.forward(x)["two"], result.model(x)["two"])
    first = result.model.encoder[0](x)
    assert not torch.equal(first, result.simulated().model.encoder[0](x))


def test_containers_are_containers() -> None:
    _, result = tagger()
    assert len(result.model.encoder) == 3
    assert [type(module._quantkit_module) for module in result.model.encoder] == [nn.Linear, nn.GELU, nn.Linear]
    assert "one" in result.model.heads and list(result.model.heads) == ["one", "two"]
    assert bool(result.model) and bool(result.model.encoder)


def test_methods_of_the_real_model_compute_on_integers() -> None:
    _, result = tagger()
    real, x = result.to_real(), randn(7, 6, seed=9)
    torch.testing.assert_close(real.model.encode(x), result.model.encode(x), atol=0.02, rtol=0)
    torch.testing.assert_close(real.model.encoder(x), result.model.encoder(x), atol=0.02, rtol=0)
    assert real.quantized.weight_bytes == result.plan.size_bytes


def test_copies_are_models_of_their_own() -> None:
    _, result = tagger()
    x, other = randn(3, 6), copy.deepcopy(result.model)
    assert torch.equal(other(x)["one"], result.model(x)["one"])
    with torch.no_grad():
        other.encoder[0].bias.add_(1)
    assert not torch.equal(other(x)["one"], result.model(x)["one"])


def test_modes_and_parameters_reach_the_users_model() -> None:
    result = quantized(small(), randn(16, 2, 6, 6))
    assert not result.model.training
    result.model.train()
    assert result.simulated().model.stem.training
    result.model.eval()
    names = [name for name, _ in result.simulated().model.named_parameters()]
    assert [name.removeprefix("_quantkit_module.") for name, _ in result.model.named_parameters()] == names


@cache
def llama() -> tuple[nn.Module, Result]:
    entry = ARCHITECTURES["llama"]
    model = entry.build()
    return model, quantized(model, entry.batch(16)[1], "w8a4")


def greedy(model: Callable[..., Any], ids: Tensor, count: int) -> tuple[Tensor, list[Tensor]]:
    """The slow twin of ``generate``: the whole sequence again for every token."""
    logits = []
    for _ in range(count):
        with torch.no_grad():
            logits.append(model(input_ids=ids).logits[:, -1])
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], 1)
    return ids, logits


GENERATE = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}


@pytest.mark.parametrize("cache", [False, True], ids=["", "cache"])
def test_generate_computes_quantized(cache: bool) -> None:
    _, result = llama()
    ids = ARCHITECTURES["llama"].batch(3)[1]["input_ids"]
    wanted, logits = greedy(result.model, ids, 6)
    options = GENERATE | {"use_cache": cache, "return_dict_in_generate": True, "output_logits": True}
    found = result.model.generate(input_ids=ids, **options)
    assert torch.equal(found.sequences, wanted)
    torch.testing.assert_close(list(found.logits), logits, atol=1e-3, rtol=0)

    _, alone = greedy(result.simulated().model, ids, 1)
    assert (alone[0] - logits[0]).norm() > 0.01 * logits[0].norm()


def test_the_real_model_generates_too() -> None:
    _, result = llama()
    entry = ARCHITECTURES["llama"]
    result = quantized(entry.build(), entry.batch(16)[1], "w8a8")
    ids = entry.batch(3)[1]["input_ids"]
    real = result.to_real().model
    found = real.generate(input_ids=ids, **GENERATE)
    assert torch.equal(found, greedy(real, ids, 6)[0])
    assert torch.equal(found[:, :9], result.model.generate(input_ids=ids, **GENERATE)[:, :9])


@cache
def with_tables() -> Result:
    """T5 with its tables, which are tied or read by themselves, among the quantized layers."""
    target = Target.load("onnxruntime-cpu")
    target = replace(target, name="npu", layers=(*target.layers, "embedding"))
    entry = ARCHITECTURES["t5"]
    model, plain = entry.build(), {"reconstruction": "none", "correction": None, "progress": False}
    modules = [name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)]
    tied = ("lm_head", "encoder.embed_tokens", "decoder.embed_tokens")  # other names of the table
    plan = dict.fromkeys([name for name in modules if name not in tied], "w4a8")
    return quantkit.apply(model, plan, entry.batch(16)[1], target=target, **plain)


def through_its_encoder(model: Any, ids: Tensor) -> Tensor:
    states = model.get_encoder()(input_ids=ids)
    return model(encoder_outputs=states, decoder_input_ids=ids).logits


@pytest.mark.parametrize(
    "used",
    [
        lambda model, ids: model(input_ids=ids, decoder_input_ids=ids).logits,
        lambda model, ids: model.generate(input_ids=ids, **GENERATE),
        lambda model, ids: model.generate(**GENERATE, bos_token_id=1),
        through_its_encoder,
        lambda model, ids: model.get_input_embeddings()(ids.to(model.device)),
        lambda model, ids: model.decoder.block[0].layer[0].SelfAttention.compute_bias(4, 4),
    ],
    ids=["forward", "generate", "generate from nothing", "encoder", "table", "tensors where a weight is"],
)
def test_an_encoder_and_decoder_with_tables_in_codes_works_in_real(used: Callable[[Any, Tensor], Tensor]) -> None:
    result, ids = with_tables(), ARCHITECTURES["t5"].batch(3)[1]["input_ids"]
    with torch.no_grad():
        found, wanted = used(result.to_real().model, ids), used(result.model, ids)
    torch.testing.assert_close(found, wanted, atol=0.02, rtol=0)


def test_modules_that_methods_return_compute_quantized() -> None:
    result, ids = with_tables(), ARCHITECTURES["t5"].batch(3)[1]["input_ids"]
    with torch.no_grad():
        wanted = result.model.encoder(input_ids=ids).last_hidden_state
        assert torch.equal(result.model.get_encoder()(input_ids=ids).last_hidden_state, wanted)
        alone = result.simulated().model.encoder(input_ids=ids).last_hidden_state
    assert not torch.allclose(alone, wanted, atol=1e-4)


def test_placeholders_say_where_the_model_is_and_hold_nothing() -> None:
    real = tagger()[1].to_real().model
    weight = next(real.parameters())
    assert weight.device == copy.deepcopy(weight).device == torch.device("cpu")
    assert weight.is_meta and (weight * 2).device == torch.device("meta")


def in_threads(work: Callable[[int], Any], count: int = 4) -> list[Any]:
    """What ``work`` gives in so many threads that start together."""
    found: dict[int, Any] = {}
    start = threading.Barrier(count)

    def one(number: int) -> None:
        start.wait()
        found[number] = work(number)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[number] for number in range(count)]


def stateful() -> nn.Module:
    torch.manual_seed(0)
    return Stateful().eval()


class Stateful(nn.Module):
    """State of every kind that a forward may leave behind."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("last", None)
        self.count, self.cache, self.seen, self.by_size = 0, None, [], {}

    def forward(self, x: Tensor) -> Tensor:
        self.mean.add_(x.detach().abs().mean(0))
        self.calls = self.calls + 1
        self.count += 1
        if self.cache is None or len(self.cache) != len(x):
            self.cache = torch.linspace(0, 1, len(x)).unsqueeze(1)
        self.seen.append(x.shape[0])
        self.by_size[len(self.seen)] = len(x)
        self.last, self.made_here = x, x + 1
        y = F.gelu(self.one(x * self.calls + 0 * self.mean + self.count - len(self.seen)))
        return self.two(y + 0 * self.cache[:1])


def state_of(model: nn.Module) -> dict[str, Any]:
    names = ("mean", "calls", "last", "count", "cache", "seen", "by_size")
    return {name: copy.deepcopy(getattr(model, name)) for name in names} | {"made": hasattr(model, "made_here")}


def test_state_that_a_forward_updates_comes_out_as_before() -> None:
    model, x = stateful(), randn(32, 6)
    fresh = state_of(model)
    result = quantized(model, x)
    inner = result.simulated().model
    for one in (model, inner):
        assert str(state_of(one)) == str(fresh)
    found = result.model(x)
    assert torch.equal(result.model(x), found)
    torch.testing.assert_close(torch.cat([result.model(part) for part in x.split(5)]), found)
    assert str(state_of(inner)) == str(fresh)


def test_plans_do_not_depend_on_how_samples_are_split() -> None:
    x = randn(32, 6)
    whole, parts = (quantized(stateful(), batches) for batches in (x, list(x.split(8))))
    for name, weight in whole.simulated().weights.items():
        torch.testing.assert_close(weight.scale, parts.simulated().weights[name].scale, rtol=1e-4, atol=0)
    assert whole.plan.digest() == parts.plan.digest()


@pytest.mark.parametrize("build", [small, stateful], ids=["plain", "with state"])
@pytest.mark.parametrize("real", [False, True], ids=["simulated", "real"])
def test_threads_get_what_one_thread_gets(build: Callable[[], nn.Module], real: bool) -> None:
    shape = (2, 6, 6) if build is small else (6,)
    result = quantized(build(), randn(16, *shape))
    model = (result.to_real() if real else result).model
    inputs = [randn(5, *shape, seed=number) for number in range(4)]
    wanted = [model(x) for x in inputs]

    def work(number: int) -> list[Tensor]:
        torch.set_grad_enabled(number % 2 == 0)
        return [model(inputs[number]) for _ in range(8)]

    for found, expected in zip(in_threads(work), wanted, strict=True):
        assert all(torch.equal(one, expected) for one in found)


def test_threads_may_call_a_model_while_another_exports_it(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    result = quantized(small(), randn(16, 2, 6, 6))
    x = randn(5, 2, 6, 6, seed=9)
    wanted = result.model(x)

    def work(number: int) -> Any:
        if number == 0:
            return result.export_onnx(tmp_path / "model.onnx")
        return [result.model(x) for _ in range(40)]

    report, *found = in_threads(work)
    assert report.path.exists() if hasattr(report, "path") else report is not None
    assert all(torch.equal(one, wanted) for outputs in found for one in outputs)
