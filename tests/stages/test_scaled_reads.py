"""Reads of linear layers through a ratio for each channel, from the search to files, saved models and kernels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import quantkit
from quantkit.backends.onnxruntime.sessions import open_session
from quantkit.formats import Scheme
from quantkit.numbers.ratios import divided, exponents, factors, multiplied
from quantkit.numbers.uniform import QuantizedWeight, SiteRange
from quantkit.reconstruction.learned import LearnedRange, LearnedWeight
from quantkit.rounding.blocks import Blocks
from quantkit.rounding.moments import Moments
from quantkit.runtime.int_linear.layer import IntLinear
from quantkit.stages.options import ApplyOptions
from quantkit.stages.reparameterize import within_bytes

WIDTH, TOKENS = 16, 7


class PostNorm(nn.Module):
    """Two blocks that normalize behind the residual addition, so that it reads what each norm makes; channels behind
    norms and behind GELU are uneven.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.ups, self.gates = (nn.ModuleList(nn.Linear(WIDTH, 32) for _ in range(2)) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(32, WIDTH) for _ in range(2))
        with torch.no_grad():
            uneven = torch.logspace(-1, 1.5, WIDTH)[torch.randperm(WIDTH)]
            for norm in self.norms:
                norm.weight.mul_(uneven)
            for layer in (*self.ups, *self.gates):
                layer.weight.div_(uneven)
            for up, down in zip(self.ups, self.downs, strict=True):
                wide = torch.logspace(-1, 1, 32)[torch.randperm(32)]
                up.weight.mul_(wide.unsqueeze(1))
                down.weight.div_(wide)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](self.embed(x))
        for up, gate, down, norm in zip(self.ups, self.gates, self.downs, self.norms[1:], strict=True):
            x = norm(x + down(nn.functional.gelu(up(x)) * torch.sigmoid(gate(x))))
        return x


LAYERS = ("embed", "ups.0", "gates.0", "downs.0", "ups.1", "gates.1", "downs.1")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(5)
    return PostNorm().eval()


def drawn(seed: int, count: int = 48) -> Tensor:
    return torch.randn(count, TOKENS, 6, generator=torch.Generator().manual_seed(seed))


def applied(model: nn.Module, scheme: str, way: str = "reads", **options: object) -> quantkit.Result:
    settings: dict[str, object] = {"rounding": "nearest", "reconstruction": "none", "correction": None} | options
    plan = quantkit.Plan.of(dict.fromkeys(LAYERS, scheme) | {"embed": "w8a8d" if scheme.endswith("d") else "w8a8"})
    return quantkit.apply(model, plan, drawn(1), reparameterization=way, progress=False, **settings)  # type: ignore[arg-type]


@torch.no_grad()
def damage(model: nn.Module, result: quantkit.Result) -> float:
    unseen = drawn(2, 128)
    wanted = model(unseen)
    return float(((result.model(unseen) - wanted).square().mean((0, 1)) / wanted.var((0, 1))).mean())


def ratios(result: quantkit.Result) -> dict[str, tuple[int, ...]]:
    return {name: weight.ratio for name, weight in result.simulated().weights.items() if weight.integer}


@pytest.mark.parametrize("scheme", ["w8a4", "w8a4d"])
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_uneven_channels_are_saved_where_norms_cannot_be_rewritten(
    model: nn.Module, scheme: str, rounding: str
) -> None:
    plain, scaled = (applied(model, scheme, way, rounding=rounding) for way in ("none", "reads"))
    assert damage(model, scaled) < damage(model, plain) / 2
    found = ratios(scaled)
    assert found["ups.0"] == found["gates.0"] != ()
    assert any("scaled as it is read" in note for note in scaled.notes["reparameterization"].values())
    assert not any(ratios(plain).values())


def test_even_channels_are_left_as_they_are() -> None:
    torch.manual_seed(3)
    even = nn.Sequential(nn.Linear(6, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 5)).eval()
    plan = quantkit.Plan.of({"0": "w8a8", "2": "w8a8"})
    result = quantkit.apply(even, plan, drawn(1).flatten(0, 1), reparameterization="reads", progress=False)
    assert not any(ratios(result).values())


@pytest.mark.parametrize("scheme", ["w8a4", "w4a8", "w4a8d"])
def test_files_and_saved_models_compute_as_the_simulated_one(model: nn.Module, scheme: str, tmp_path: Path) -> None:
    result, unseen = applied(model, scheme), drawn(3, 128)
    found = ratios(result)
    sites = {w: s.name for s in result.simulated().sites for w in s.consumers}
    stored = {sites[name]: 4 * len(ratio) for name, ratio in found.items()}
    assert sum(stored.values()) == result.plan.total_bytes - applied(model, scheme, "none").plan.total_bytes > 0
    with torch.no_grad():
        wanted = result.model(unseen)
    result.save(tmp_path)
    loaded = quantkit.load(tmp_path, model)
    assert loaded.simulated().ranges == result.simulated().ranges
    assert ratios(loaded) == ratios(result)
    with torch.no_grad():
        assert torch.equal(loaded.model(unseen), wanted)
    session = open_session(result.export_onnx(tmp_path / "model.onnx").path, optimized=True)
    found = session.run(None, {session.get_inputs()[0].name: unseen.numpy()})[0]
    close = np.isclose(found, wanted.numpy(), rtol=0, atol=1e-3 * float(wanted.abs().max())).all((1, 2))
    assert close.mean() > 0.9  # a code that falls the other way at a tie moves what comes after it


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w8a8d"])
def test_integer_kernels_compute_as_the_simulated_model(model: nn.Module, scheme: str) -> None:
    result, unseen = applied(model, scheme), drawn(3, 128)
    real = result.to_real()
    with torch.no_grad():
        wanted, found = result.model(unseen), real.model(unseen)
    close = torch.isclose(found, wanted, rtol=0, atol=1e-3 * float(wanted.abs().max())).all(2).all(1)
    assert close.float().mean() > 0.9
    assert {n: w.ratio for n, w in real.quantized.weights.items()} == ratios(result)


def test_a_plan_for_so_many_bytes_gets_no_ratios(model: nn.Module) -> None:
    plan = quantkit.Plan.of(dict.fromkeys(LAYERS, "w8a4"))
    limited = replace(plan, provenance=plan.provenance | {"budget": "4 bits, 300 KB"})
    assert within_bytes(ApplyOptions(), plan) == ApplyOptions()
    assert within_bytes(ApplyOptions(), limited).reparameterization == "clip+softmax"
    assert within_bytes(ApplyOptions(reparameterization="reads"), limited).reparameterization == "none"


def test_a_read_whose_codes_others_read_has_no_ratio() -> None:
    torch.manual_seed(5)

    class Shown(PostNorm):
        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.gelu(self.ups[0](self.embed(x)))
            return self.downs[0](x) @ x.transpose(1, 2)[:, :WIDTH]

    result = quantkit.apply(
        Shown().eval(), quantkit.Plan.of(dict.fromkeys(("embed", "ups.0", "downs.0"), "w8a4")), drawn(1),
        reparameterization="reads", rounding="nearest", reconstruction="none", correction=None, progress=False,
    )  # fmt: skip
    assert ratios(result)["downs.0"] == ()


def test_the_product_stays_what_it_was() -> None:
    x, weight = torch.randn(50, 12, dtype=torch.float64), torch.randn(8, 12, dtype=torch.float64)
    ratio = exponents(x.abs().amax(0) ** 0.7 * torch.logspace(-3, 3, 12))
    assert len(set(ratio)) > 5
    assert max(ratio) == 0
    torch.testing.assert_close(divided(x, ratio) @ multiplied(weight, ratio).T, x @ weight.T, rtol=1e-12, atol=1e-12)


def example() -> tuple[Tensor, Tensor, QuantizedWeight, SiteRange]:
    draws = torch.Generator().manual_seed(2)
    ratio = (0, -1, 2, -3, 0, 1)
    x, weight = torch.randn(40, 6, generator=draws) * factors(ratio), torch.randn(4, 6, generator=draws)
    format = Scheme.parse("w4").weight
    assert format is not None
    scale = torch.rand(4, 1, generator=draws) + 0.2
    start = QuantizedWeight(torch.zeros(4, 6, dtype=torch.int8), scale, None, format, ratio)
    start = QuantizedWeight(start.quantize(weight).codes, scale, None, format, ratio)
    return x, weight, start, SiteRange(0.125, 9, 5, ratio)


def test_codes_are_those_of_a_scale_for_each_channel() -> None:
    x, weight, held, site = example()
    steps = 0.125 * 2.0 ** np.array(site.ratio)
    codes = np.clip(np.rint(x.numpy() / steps.astype(np.float32)) + 9, 0, 31)
    assert np.array_equal(site.quantize(x).codes.numpy(), codes)
    np.testing.assert_allclose(site.fake_quantize(x).numpy(), (codes - 9) * steps, rtol=1e-6)
    inputs = held.scale.numpy() / 2.0 ** np.array(site.ratio, np.float32)
    codes = np.clip(np.rint(weight.numpy() / inputs), -8, 7)
    assert np.array_equal(held.codes.numpy(), codes)
    np.testing.assert_allclose(held.dequantize().numpy(), codes * inputs, rtol=1e-6)


def test_an_integer_layer_divides_what_it_reads() -> None:
    x, _, held, site = example()
    bias = torch.arange(4.0) * 0.125 * held.scale.squeeze(1)
    found = IntLinear(held, bias, site)(x)
    torch.testing.assert_close(found, site.fake_quantize(x) @ held.dequantize().T + bias, rtol=1e-5, atol=1e-5)
    assert IntLinear(held, bias, site).quantized().ratio == site.ratio


def test_learning_starts_from_the_same_values() -> None:
    x, _, held, site = example()
    learned = LearnedWeight(held.dequantize(), held, None, torch.ones(4))
    assert torch.equal(learned.value(), held.dequantize())
    assert torch.equal(learned.found().codes, held.codes)
    assert learned.found().ratio == held.ratio
    assert torch.equal(LearnedRange(site).fake_quantize(x), site.fake_quantize(x))
    assert LearnedRange(site).found() == site


@pytest.mark.parametrize("count", [1, 3])
def test_moments_are_those_of_the_divided_inputs(count: int) -> None:
    x, _, _, site = example()
    x, blocks = x.double(), Blocks(count, 6 // count)

    def moments(rows: Tensor) -> Moments:
        parts = blocks.cut(rows.unsqueeze(0))
        hessian = parts.transpose(1, 2) @ parts
        return Moments(hessian, 2 * hessian, count)

    found, wanted = moments(x).divided(factors(site.ratio)), moments(divided(x, site.ratio))
    torch.testing.assert_close(found.hessian, wanted.hessian)
    assert found.cross is not None
    torch.testing.assert_close(found.cross, 2 * wanted.hessian)
