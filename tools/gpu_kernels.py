"""The GPU half of tools/bench_kernels.py: our Triton kernels against bf16 cuBLAS, torch's int4pack and torch's FP8.

A few layers of one shape, together larger than the second-level cache, run in turn; on a GPU they are captured in one
CUDA graph, so that the launches of small kernels do not count. Tiles are tuned first, per shape, and kept in a table.
Limits are measured in the same run: the speed of summing a large tensor, and the best of torch's FP8 products.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from triton.runtime.errors import OutOfResources

from quantkit.formats import Scheme
from quantkit.numbers.uniform import QuantizedWeight
from quantkit.runtime.kv_attention.attention import kv_attention
from quantkit.runtime.kv_attention.cache import quantize_kv
from quantkit.runtime.low_bit_matmul import weights
from quantkit.runtime.low_bit_matmul.linear import low_bit_linear, use_table
from quantkit.runtime.low_bit_matmul.tuning import Tile, TuningTable
from quantkit.runtime.low_bit_matmul.weights import MatmulWeight
from quantkit.runtime.token_quant.kernel import quantize_rows_fp8

GROUP = 128
CACHE_BYTES = 128 << 20  # a chain of 4-bit weights is at least as long as this
BASE = "bf16 cuBLAS"
Run = Callable[[], object]


@dataclass(frozen=True)
class Bench:
    """Where and how thoroughly to measure. ``cache_bytes``: what a chain of weights has to pass."""

    device: str = "cuda"
    rounds: int = 9
    cache_bytes: int = CACHE_BYTES
    type: torch.dtype = torch.bfloat16

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.type)

    def captured(self, run: Run) -> Run:
        """``run`` as one CUDA graph; itself on a CPU."""
        if self.device == "cpu":
            return run
        for _ in range(2):  # compiles, and lets the allocator settle
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def seconds(self, run: Run) -> float:
        if self.device == "cpu":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        run()
        after.record()
        torch.cuda.synchronize()
        return before.elapsed_time(after) / 1e3

    def interleaved(self, runs: dict[str, Run]) -> dict[str, list[float]]:
        """Seconds of every run in every round; the first round warms up."""
        ready = {name: self.captured(run) for name, run in runs.items()}
        rounds = [{name: self.seconds(run) for name, run in ready.items()} for _ in range(self.rounds + 1)]
        return {name: [times[name] for times in rounds[1:]] for name in runs}


def one_after_another(layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> None:
    for layer in layers:
        layer(x)


def rounded(weight: Tensor, scheme: str) -> QuantizedWeight:
    """``weight`` rounded to nearest, scales from the largest magnitude."""
    form = Scheme.parse(scheme).weight
    assert form is not None
    grouped = weight.float().unflatten(1, (-1, form.group or weight.shape[1]))
    low, high = form.code_range
    scale = grouped.abs().amax(-1).clamp_min(1e-12) / high
    codes = torch.round(grouped / scale.unsqueeze(-1)).clamp(low, high).to(torch.int8)
    return QuantizedWeight(codes.flatten(1), scale, None, form)


OURS: dict[str, Callable[[Tensor], MatmulWeight]] = {
    weights.INT4_FP8: lambda weight: weights.quantize_fireq(weight, GROUP),
    weights.INT4_HALF: lambda weight: weights.four_bit_weight(rounded(weight, f"w4g{GROUP}"), fp8=False),
    weights.FP8: weights.fp8_weight,
    weights.INT8: lambda weight: weights.int8_weight(rounded(weight, "w8")),
}


def torch_fp8(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """torch._scaled_mm with a scale per row and per channel, its rows quantized by our kernel."""
    held = weights.fp8_weight(weight)
    by, codes = held.scale.unsqueeze(0), held.codes.t()

    def run(x: Tensor) -> Tensor:
        rows, scale = quantize_rows_fp8(x)
        return torch._scaled_mm(rows, codes, scale.unsqueeze(1), by, out_dtype=torch.bfloat16)

    return run


def torch_int4pack(weight: Tensor) -> Callable[[Tensor], Tensor]:
    found = rounded(weight, f"w4g{GROUP}")
    unsigned = (found.codes.to(torch.int32) + 8).to(torch.uint8)
    packed = torch._convert_weight_to_int4pack(unsigned[:, ::2] << 4 | unsigned[:, 1::2], 8)
    both = torch.stack((found.scale.t(), torch.zeros_like(found.scale.t())), -1).bfloat16().contiguous()
    return lambda x: torch._weight_int4pack_mm(x, packed, GROUP, both)


def tuned(bench: Bench, table: TuningTable, made: list[MatmulWeight], rows: int, gated: bool = False) -> None:
    """Find the fastest tile of a shape, unless the table has it."""
    weight, x = made[0], bench.normal(rows, made[0].inputs)
    sizes = (rows, weight.channels, weight.inputs)

    def seconds(tile: Tile) -> float:
        try:
            run = bench.captured(lambda: [low_bit_linear(x, w, None, gated, tile) for w in made])
        except OutOfResources:
            return float("inf")  # a tile that this GPU's shared memory does not hold
        return min(bench.seconds(run) for _ in range(3))

    name = torch.cuda.get_device_name() if bench.device == "cuda" else bench.device
    if not table.has(name, weight.kind, *sizes):
        table.tune(name, weight.kind, sizes, seconds)
    use_table(table)


def read_speed(bench: Bench, count: int = 1 << 28) -> float:
    """Bytes a second of summing a large tensor."""
    large = torch.ones(count, device=bench.device)
    return large.nbytes / min(bench.seconds(large.sum) for _ in range(10))


def fp8_speed(bench: Bench, size: int = 8192) -> float:
    """Operations a second of torch's FP8 product of two square matrices."""
    left, right = (weights.fp8_weight(bench.normal(size, size)).codes for _ in range(2))
    one = torch.ones((), device=bench.device)
    run = bench.captured(lambda: torch._scaled_mm(left, right.t(), one, one, out_dtype=torch.bfloat16))
    return 2 * size**3 / min(bench.seconds(run) for _ in range(10))


def table_of(bench: Bench, title: str, runs: dict[str, Run], layers: int, shares: dict[str, float]) -> None:
    """Print times, speed over bf16 and the share of a limit: ``shares`` are the seconds a layer needs at the limit."""
    times = bench.interleaved(runs)
    print(f"\n{title}\n| | us a layer | x {BASE} | % of limit |\n|---|---|---|---|")
    for name, found in times.items():
        seconds = statistics.median(found) / layers
        ratio = statistics.median(a / b for a, b in zip(times[BASE], found, strict=True))
        share = f"{100 * shares[name] / seconds:.0f}" if name in shares else ""
        print(f"| {name} | {1e6 * seconds:.1f} | {ratio:.2f} | {share} |", flush=True)


def bench_linear(bench: Bench, table: TuningTable, rows: int, size: int, limits: tuple[float, float]) -> None:
    """Rows against square weights: at the reading limit for few rows, at the FP8 peak for many."""
    few = rows <= 64
    count = max(2, bench.cache_bytes // (size * size // 2)) if few else 2
    plain = [bench.normal(size, size) / size**0.5 for _ in range(count)]
    x = bench.normal(rows, size)
    runs: dict[str, Run] = {BASE: partial(one_after_another, [partial(F.linear, weight=w) for w in plain], x)}
    read = {BASE: plain[0].nbytes}
    if bench.device == "cuda":
        others = {"torch._scaled_mm FP8": torch_fp8, "torch int4pack": torch_int4pack}
        runs |= {name: partial(one_after_another, [make(w) for w in plain], x) for name, make in others.items()}
        read |= {"torch._scaled_mm FP8": size * size, "torch int4pack": size * size // 2 + 4 * size * size // GROUP}
    for kind, make in OURS.items():
        made = [make(weight) for weight in plain]
        tuned(bench, table, made, rows)
        runs[f"quantkit {kind}"] = partial(
            one_after_another, [partial(low_bit_linear, weight=weight) for weight in made], x
        )
        read[f"quantkit {kind}"] = made[0].nbytes
    work = 2 * rows * size * size
    shares = {name: read[name] / limits[0] if few else work / limits[1] for name in runs}
    table_of(bench, f"{rows} rows, {size} inputs and channels, {count} layers", runs, count, shares)


def feed_forward(up: Tensor, down: Tensor, x: Tensor) -> Tensor:
    """A gated feed-forward network; ``up`` has the gates first."""
    gate, value = F.linear(x, up).chunk(2, 1)
    return F.linear(F.silu(gate) * value, down)


def feed_forward_of(up: MatmulWeight, down: MatmulWeight, x: Tensor) -> Tensor:
    return low_bit_linear(low_bit_linear(x, up, None, True), down)


def bench_ffn(bench: Bench, table: TuningTable, rows: int, hidden: int, inner: int) -> None:
    """The feed-forward network of a language model (Llama2-7B: 4096, 11008)."""
    up, down = bench.normal(2 * inner, hidden) / hidden**0.5, bench.normal(hidden, inner) / inner**0.5
    x = bench.normal(rows, hidden)
    runs: dict[str, Run] = {BASE: partial(feed_forward, up, down, x)}
    for kind in (weights.INT4_FP8, weights.INT4_HALF, weights.FP8):
        first, second = OURS[kind](up), OURS[kind](down)
        tuned(bench, table, [first], rows, gated=True)
        tuned(bench, table, [second], rows)
        runs[f"quantkit {kind}"] = partial(feed_forward_of, first, second, x)
    table_of(bench, f"Feed-forward network {hidden} x {inner}, {rows} rows", runs, 1, {})


def bench_attention(bench: Bench, batch: int, heads: int, tokens: int, dim: int = 128) -> None:
    """One new token against a cache of ``tokens``: torch's attention on bf16 against ours on four bits."""
    keys, values = (bench.normal(batch, heads, tokens, dim) for _ in range(2))
    queries = bench.normal(batch, heads, 1, dim)
    cache = quantize_kv(keys, values)
    runs: dict[str, Run] = {
        BASE: lambda: F.scaled_dot_product_attention(queries, keys, values),
        "quantkit int4 cache": lambda: kv_attention(queries, cache),
    }
    table_of(
        bench, f"Attention of one position, {batch} x {heads} heads, {tokens} tokens (bf16: torch's)", runs, 1, {}
    )


@torch.no_grad()
def bench_gpu(path: Path) -> None:
    """Everything, on this GPU; tiles go into the table at ``path``."""
    bench, table = Bench(), TuningTable.load(path)
    limits = read_speed(bench), fp8_speed(bench)
    print(f"\n{torch.cuda.get_device_name()}: reads {limits[0] / 1e12:.2f} TB/s, FP8 {limits[1] / 1e12:.0f} TFLOP/s")
    for size in (4096, 8192):
        for rows in (1, 16, 4096):
            bench_linear(bench, table, rows, size, limits)
            table.save(path)
    for rows in (16, 2048):
        bench_ffn(bench, table, rows, 4096, 11008)
        table.save(path)
    bench_attention(bench, 16, 32, 8192)
