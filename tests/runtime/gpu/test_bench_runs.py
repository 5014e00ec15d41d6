"""The GPU benchmark's own paths, on tiny sizes: it is run for its figures only where there is a GPU."""

from __future__ import annotations

import pytest
import torch

from quantkit.runtime.low_bit_matmul import weights
from quantkit.runtime.low_bit_matmul.tuning import Tile, TuningTable
from tools import gpu_kernels
from tools.gpu_kernels import Bench, bench_attention, bench_ffn, bench_linear


@pytest.fixture
def bench() -> Bench:
    return Bench("cpu", rounds=1, cache_bytes=1, type=torch.float32)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> TuningTable:
    """One candidate: the search itself is tested beside the table."""
    monkeypatch.setattr("quantkit.runtime.low_bit_matmul.tuning.candidates", lambda *_: iter([Tile(64, 64, 64)]))
    monkeypatch.setattr(gpu_kernels, "use_table", lambda table: None)
    return TuningTable()


@pytest.mark.parametrize("rows", [1, 65])
def test_linear_layers_are_timed_beside_bf16_and_tuned_once(
    bench: Bench, table: TuningTable, rows: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with torch.no_grad():
        bench_linear(bench, table, rows, 128, (1e9, 1e9))
        tuned = {device: dict(tiles) for device, tiles in table.measured.items()}
        bench_linear(bench, table, rows, 128, (1e9, 1e9))
    assert table.measured == tuned and len(tuned["cpu"]) == 4
    lines = capsys.readouterr().out.splitlines()
    for kind in (weights.INT4_FP8, weights.INT4_HALF, weights.FP8, weights.INT8):
        (first, _) = (line.split(" | ") for line in lines if line.startswith(f"| quantkit {kind} |"))
        assert all(float(cell.strip(" |")) >= 0 for cell in first[1:])


def test_feed_forward_networks_and_attention_are_timed(
    bench: Bench, table: TuningTable, capsys: pytest.CaptureFixture[str]
) -> None:
    with torch.no_grad():
        bench_ffn(bench, table, 2, 128, 128)
        bench_attention(bench, 1, 1, 64, dim=32)
    out = capsys.readouterr().out
    assert out.count("bf16 cuBLAS |") == 2 + 2 and "| quantkit int4 cache |" in out


def test_the_feed_forward_networks_compute_nearly_the_same(bench: Bench) -> None:
    """What is timed against each other is the same function, but for rounding."""
    torch.manual_seed(0)
    up, down, x = bench.normal(256, 128) / 128**0.5, bench.normal(128, 128) / 128**0.5, bench.normal(2, 128)
    exact = gpu_kernels.feed_forward(up, down, x)
    for kind in (weights.INT4_FP8, weights.FP8):
        found = gpu_kernels.feed_forward_of(gpu_kernels.OURS[kind](up), gpu_kernels.OURS[kind](down), x)
        assert float((found - exact).norm() / exact.norm()) < 0.3
