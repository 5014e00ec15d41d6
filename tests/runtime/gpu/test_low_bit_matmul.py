"""Every matmul kernel equals its reference: integers bit for bit, FP8 and 16-bit ones within float32 accumulation."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.errors import CorruptFile, InvalidRequest
from quantkit.numbers.scales import per_tensor_power
from quantkit.runtime.low_bit_matmul import weights
from quantkit.runtime.low_bit_matmul.linear import low_bit_linear, use_table
from quantkit.runtime.low_bit_matmul.tuning import Tile, TuningTable, candidates, rule_of_thumb, shape_class
from quantkit.runtime.low_bit_matmul.weights import MatmulWeight
from quantkit.runtime.token_quant.fp8 import to_e4m3
from tests.runtime.gpu.twins import low_bit_linear_reference, unpack_halves, weight_values
from tests.runtime.test_int_layers import weight_of

KINDS = (weights.INT4_FP8, weights.INT4_HALF, weights.FP8, weights.INT8)


def weight_for(kind: str, channels: int, inputs: int, group: int, seed: int) -> MatmulWeight:
    draw = torch.Generator().manual_seed(seed)
    if kind == weights.INT4_FP8:
        return weights.quantize_fireq(torch.randn(channels, inputs, generator=draw) * 0.02, group)
    if kind == weights.INT4_HALF:
        return weights.four_bit_weight(weight_of(f"w4g{group}", (channels, inputs), seed), fp8=False)
    if kind == weights.FP8:
        return weights.fp8_weight(torch.randn(channels, inputs, generator=draw))
    return weights.int8_weight(weight_of("w8", (channels, inputs), seed))


def on(weight: MatmulWeight, device: str) -> MatmulWeight:
    moved = weight.codes.to(device), weight.scale.to(device)
    return MatmulWeight(weight.kind, *moved, weight.group, weight.tensor_scale)


def assert_equals_reference(
    device: str, x: Tensor, weight: MatmulWeight, bias: Tensor | None, gated: bool, tile: Tile | None
) -> None:
    wanted = low_bit_linear_reference(x, weight, bias, gated)
    moved = None if bias is None else bias.to(device)
    found = low_bit_linear(x.to(device), on(weight, device), moved, gated, tile).cpu()
    assert found.dtype == x.dtype and found.shape == wanted.shape
    wanted = wanted.to(x.dtype)
    if weight.kind == weights.INT8 and not gated:
        assert torch.equal(found, wanted)
    else:  # sums of float32 in another order, then one rounding to the type
        loose = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[x.dtype]
        largest = float(wanted.abs().max()) if wanted.numel() else 0.0
        torch.testing.assert_close(found, wanted, rtol=loose, atol=loose * (largest + 1e-6))


@st.composite
def problems(draw: st.DrawFn) -> tuple:
    kind = draw(st.sampled_from(KINDS))
    group = draw(st.sampled_from([64, 128] if kind == weights.INT4_FP8 else [32, 64, 128]))
    unit = group if kind in weights.SMALLEST_GROUP else 16
    inputs = unit * draw(st.integers(1, 3 if unit > 16 else 9))
    gated = draw(st.booleans())
    rows, channels = draw(st.integers(0, 40)), draw(st.integers(1, 40)) * (2 if gated else 1)
    seed = draw(st.integers(0, 10**6))
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=random)
    if draw(st.booleans()):
        x = torch.randn(inputs, rows, generator=random).t()
    x = x.to(draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])))
    bias = torch.randn(channels, generator=random) if draw(st.booleans()) else None
    tile = Tile(16, draw(st.sampled_from([16, 32])), draw(st.sampled_from([16, 32])), draw(st.integers(1, 3)))
    if kind == weights.INT4_FP8:
        tile = Tile(16, tile.columns, 32, tile.split)
    return x, weight_for(kind, channels, inputs, group, seed), bias, gated, tile


@pytest.mark.slow
def test_kernels_equal_the_reference_on_random_shapes(device: str, pytestconfig: pytest.Config) -> None:
    @settings(deadline=None, max_examples=pytestconfig.getoption("kernel_examples"))
    @given(problem=problems())
    def check(problem: tuple) -> None:
        assert_equals_reference(device, *problem)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_leading_dimensions_and_the_rule_of_thumb(device: str, kind: str) -> None:
    weight = weight_for(kind, 20, 128, 64, 0)
    x = torch.randn(2, 3, 128)
    found = low_bit_linear(x.to(device), on(weight, device)).cpu()
    wanted = low_bit_linear_reference(x.reshape(6, 128), weight).reshape(2, 3, 20)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_the_same_in_every_run(device: str, kind: str) -> None:
    weight, x = on(weight_for(kind, 20, 256, 64, 0), device), torch.randn(5, 256).to(device)
    tile = Tile(16, 16, 32, 2)
    assert torch.equal(low_bit_linear(x, weight, tile=tile), low_bit_linear(x, weight, tile=tile))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="large shapes need a GPU")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 16, 17, 8192])
def test_large_shapes_on_a_gpu(device: str, kind: str, rows: int) -> None:
    x = torch.randn(rows, 4096)
    assert_equals_reference(device, x, weight_for(kind, 512, 4096, 128, 0), torch.randn(512), True, None)


def test_halves_come_back() -> None:
    codes = torch.randint(-8, 8, (5, 256), dtype=torch.int8)
    for group in (32, 64, 128):
        assert torch.equal(unpack_halves(weights.pack_halves(codes, group), group), codes)


@pytest.mark.parametrize(("spread", "worst"), [(0.02, 0.12), (0.01, 0.12), (0.005, 0.12), (0.002, 0.14)])
def test_the_power_of_two_keeps_small_weights_from_underflow(spread: float, worst: float) -> None:
    """At a spread of 0.002 the relative error is 0.28 without it; products that stay subnormal cost the rest."""
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0)) * spread
    found = weights.quantize_fireq(weight)
    assert math.log2(found.tensor_scale).is_integer()
    error = (weight_values(found) * found.tensor_scale - weight).norm() / weight.norm()
    assert 0.11 < error < worst


def power_by_definition(largest: list[float]) -> int:
    floor, best = 7 * 2.0**-9, (math.inf, 0)
    for i in range(15):
        if any(a * 2.0**i > 448 for a in largest):
            break
        slack = sum((floor - a * 2.0**i) / floor for a in largest if a * 2.0**i < floor)
        best = min(best, (slack, i))
    return best[1]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(2.0**-20, 400, width=32), min_size=1, max_size=8))
def test_power_of_two_is_that_of_a_loop(largest: list[float]) -> None:
    assert per_tensor_power(torch.tensor(largest, dtype=torch.float64) / 7, 7, 2.0**-9) == power_by_definition(largest)


def test_products_of_code_and_scale_are_e4m3_numbers() -> None:
    values = weight_values(weights.quantize_fireq(torch.randn(16, 256)))
    assert torch.equal(to_e4m3(values).float(), values)


def test_weights_and_operands_that_no_kernel_takes() -> None:
    with pytest.raises(InvalidRequest, match=r"int4 x fp8 kernel runs .* at least 64, not w4g32"):
        weights.four_bit_weight(weight_of("w4g32", (8, 64)), fp8=True)
    with pytest.raises(InvalidRequest, match="groups of a power of two, not 96"):
        weights.four_bit_weight(weight_of("w4g96", (8, 96)), fp8=False)
    with pytest.raises(InvalidRequest, match="scales of w4g64 are not E4M3 numbers"):
        weights.four_bit_weight(weight_of("w4g64", (8, 64)), fp8=True)
    with pytest.raises(InvalidRequest, match="one scale a channel, not w8g32"):
        weights.int8_weight(weight_of("w8g32", (8, 64)))
    weight = weight_for(weights.INT8, 6, 32, 0, 0)
    with pytest.raises(InvalidRequest, match=r"rows of 32 inputs, not torch.float32 of shape \(2, 31\)"):
        low_bit_linear(torch.zeros(2, 31), weight)
    with pytest.raises(InvalidRequest, match=r"bias has shape \(5,\), the weight 6 channels"):
        low_bit_linear(torch.zeros(2, 32), weight, torch.zeros(5))
    with pytest.raises(InvalidRequest, match="gates and values, not 5 channels"):
        low_bit_linear(torch.zeros(2, 32), weight_for(weights.INT8, 5, 32, 0, 0), gated=True)
    with pytest.raises(InvalidRequest, match="36 inputs are no multiple of 16"):
        low_bit_linear(torch.zeros(2, 36), weight_for(weights.INT8, 5, 36, 0, 0))


def test_measured_tiles_are_kept_by_device(tmp_path: Path) -> None:
    table, path = TuningTable.load(tmp_path / "none.json"), tmp_path / "tiles.json"
    best = table.tune("a GPU", weights.FP8, (3, 256, 4096), lambda tile: abs(tile.columns - 128) + tile.split)
    assert (best.columns, best.split) == (128, 1)
    table.save(path)
    read = TuningTable.load(path)
    assert read.tile("a GPU", weights.FP8, 4, 256, 4096) == best
    assert read.tile("a GPU", weights.FP8, 5, 256, 4096) == rule_of_thumb(5, 256, 4096)
    assert read.tile("another", weights.FP8, 4, 256, 4096) == rule_of_thumb(4, 256, 4096)
    path.write_text("[1]")
    with pytest.raises(CorruptFile, match="is no table of kernel tiles"):
        TuningTable.load(path)


def test_the_table_in_use_is_obeyed(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(TuningTable, "tile", lambda self, *sizes: asked.append(sizes) or Tile(16, 16, 32, 1))
    use_table(TuningTable())
    low_bit_linear(torch.zeros(2, 32).to(device), on(weight_for(weights.INT8, 6, 32, 0, 0), device))
    assert [sizes[1:] for sizes in asked] == [(weights.INT8, 2, 6, 32)]


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 8192])
def test_candidates_are_tiles_the_kernels_run(rows: int) -> None:
    for tile in candidates(rows, 4096, 4096):
        assert tile.rows >= 16 and tile.columns >= 16 and 4096 // tile.split >= 512
    assert shape_class("k", rows, 1, 1).split()[1] == str(2 ** math.ceil(math.log2(rows)))
