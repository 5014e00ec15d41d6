"""How fast are the real layers, against float and what a user would pick instead, and how near to the machine's limit?

    python tools/bench_kernels.py [--threads 1 2] [--sizes 2048 4096] [--rows 1 16 128] [--rounds 7] [--llama] [--conv]

Every contender runs through a chain of as many weights as do not fit the caches, all of them in turn in every round,
in one process. Printed are the median time of a layer, the median of the rounds' ratios to float32 (above 1 is faster)
and the percentage of a limit measured here: up to 16 rows, what one layer must read at the speed of summing a large
tensor; for more, the operations of a float32 matmul of 1024 x 1024, which integers may pass. With one thread, times
are the thread's own, so that other work on the machine counts less; with more they are wall clock.

``--llama``: a transformers Llama of the data folder's architecture widened to 2048, 4 layers and random weights,
decoding token by token, float32 against 4-bit weights. ``--conv``: integer convolutions. Where there is a GPU its
kernels follow (gpu_kernels.py), with tiles tuned once and kept in ``--tiles``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantkit.formats import Scheme
from quantkit.numbers.uniform import QuantizedWeight, SiteRange
from quantkit.runtime.int_conv.layer import IntConv
from quantkit.runtime.int_linear.compiled import NAMES, instruction_set
from quantkit.runtime.int_linear.layer import IntLinear

REPOSITORY = Path(__file__).resolve().parent.parent
CACHE_BYTES = 64 << 20  # a chain of 4-bit weights is at least as long as this
FLOAT = "float32"
FEW_ROWS = 16
Clock = Callable[[], float]


@dataclass(frozen=True)
class Contender:
    """A chain of layers ``run`` on float32 rows, and the bytes one of them must read."""

    run: Callable[[Tensor], Any]
    bytes_read: int


def quantized(weight: Tensor, scheme: str) -> QuantizedWeight:
    """``weight`` rounded to nearest, scales from the largest magnitude."""
    form = Scheme.parse(scheme).weight
    assert form is not None
    grouped = weight.reshape(len(weight), -1, form.group or weight.shape[1])
    low, high = form.code_range
    scale = grouped.abs().amax(-1).clamp_min(1e-12) / high
    codes = torch.round(grouped / scale.unsqueeze(-1)).clamp(low, high).to(torch.int8)
    return QuantizedWeight(codes.reshape(weight.shape), scale, None, form)


def chain(layers: Sequence[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x

    return run


def real_layers(weights: list[Tensor], scheme: str) -> Contender:
    layers = [IntLinear(quantized(weight, scheme)) for weight in weights]
    return Contender(chain(layers), layers[0].weight_bytes)


def int4pack(weights: list[Tensor], group: int) -> Contender:
    multiply, layers, size = torch.ops.aten._weight_int4pack_mm_for_cpu, [], 0
    for weight in weights:
        found = quantized(weight, f"w4g{group}")
        codes = torch._convert_weight_to_int4pack_for_cpu(found.codes.to(torch.int32) + 8, 2)
        both = torch.stack((found.scale.t(), torch.zeros_like(found.scale).t()), -1).bfloat16().contiguous()
        layers.append(lambda x, c=codes, b=both: multiply(x, c, group, b))
        size = codes.nbytes + both.nbytes
    run = chain(layers)
    return Contender(lambda x: run(x.bfloat16()), size)


def bfloat16(weights: list[Tensor]) -> Contender:
    halves = [weight.bfloat16() for weight in weights]
    return Contender(lambda x: chain([lambda y, w=w: F.linear(y, w) for w in halves])(x.bfloat16()), halves[0].nbytes)


def onnxruntime(weights: list[Tensor], group: int, threads: int) -> Contender:
    """A chain of MatMulNBits at accuracy level 4: 4-bit weights, 8-bit activations."""
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    nodes, stored = [], []
    inputs = weights[0].shape[1]
    for i, weight in enumerate(weights):
        found = quantized(weight, f"w4g{group}")
        unsigned = (found.codes.to(torch.int16) + 8).to(torch.uint8).reshape(len(weight), -1, group // 2, 2)
        packed = (unsigned[..., 0] | unsigned[..., 1] << 4).numpy()
        stored += [numpy_helper.from_array(packed, f"w{i}"), numpy_helper.from_array(found.scale.numpy(), f"s{i}")]
        sizes = {"K": inputs, "N": len(weight), "bits": 4, "block_size": group, "accuracy_level": 4}
        names = [f"x{i}", f"w{i}", f"s{i}"]
        nodes.append(helper.make_node("MatMulNBits", names, [f"x{i + 1}"], domain="com.microsoft", **sizes))
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, inputs])  # noqa: E731
    graph = helper.make_graph(nodes, "chain", [value("x0")], [value(f"x{len(weights)}")], stored)
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    size = Scheme.parse(f"w4g{group}").weight.storage_bytes(tuple(weights[0].shape))  # type: ignore[union-attr]
    return Contender(lambda x: session.run(None, {"x0": x.numpy()}), size)


def torchao(weights: list[Tensor]) -> Contender:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    layers = nn.Sequential(*(nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights))
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight = nn.Parameter(weight.clone(), False)
    quantize_(layers, Int8DynamicActivationInt8WeightConfig())
    return Contender(layers, weights[0].numel())


def contenders(weights: list[Tensor], threads: int) -> dict[str, Contender]:
    floats = chain([lambda y, w=w: F.linear(y, w) for w in weights])  # type: ignore[misc]
    found = {
        FLOAT: Contender(floats, weights[0].nbytes),
        "bfloat16": bfloat16(weights),
        "torch int4pack g128": int4pack(weights, 128),
        "onnxruntime MatMulNBits g128": onnxruntime(weights, 128, threads),
        "onnxruntime MatMulNBits g32": onnxruntime(weights, 32, threads),
    }
    if find_spec("torchao"):
        found["torchao int8 dynamic"] = torchao(weights)
    return found | {f"quantkit {scheme}": real_layers(weights, scheme) for scheme in ("w4g128", "w4g32", "w8")}


def seconds_of(run: Callable[[], Any], clock: Clock) -> float:
    start = clock()
    run()
    return clock() - start


def read_bytes_per_second(clock: Clock) -> float:
    large = torch.ones(64 << 20)
    return large.nbytes / min(seconds_of(large.sum, clock) for _ in range(5))


def matmul_operations_per_second(clock: Clock) -> float:
    left = torch.randn(1024, 1024)
    return 2 * 1024**3 / min(seconds_of(lambda: left @ left, clock) for _ in range(5))


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int, clock: Clock) -> dict[str, list[float]]:
    """Seconds of every run in every round; one round to warm up is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            seconds = seconds_of(run, clock)
            if turn:
                times[name].append(seconds)
    return times


def speedup(times: dict[str, list[float]], name: str, over: str) -> float:
    return statistics.median(a / b for a, b in zip(times[over], times[name], strict=True))


def bench_linear(size: int, rows: Sequence[int], threads: int, rounds: int, clock: Clock) -> None:
    count = max(2, CACHE_BYTES // (size * size // 2))
    weights = [torch.randn(size, size) / size**0.5 for _ in range(count)]
    found = contenders(weights, threads)
    for number in rows:
        x = torch.randn(number, size)
        runs = {name: partial(contender.run, x) for name, contender in found.items()}
        times = interleaved(runs, rounds, clock)
        few = number <= FEW_ROWS
        limit = read_bytes_per_second(clock) if few else matmul_operations_per_second(clock)
        unit = f"{limit / 1e9:.1f} GB/s read" if few else f"{limit / 1e9:.0f} GFLOP/s float32 matmul"
        print(f"\n{number} rows, {size} inputs and channels, {threads} threads, {count} layers; limit {unit}")
        print("| | ms a layer | x float32 | % of limit |\n|---|---|---|---|")
        for name, contender in found.items():
            seconds = statistics.median(times[name]) / count
            work = contender.bytes_read if few else 2 * number * size * size
            share = 100 * work / seconds / limit
            print(f"| {name} | {1e3 * seconds:.3f} | {speedup(times, name, FLOAT):.2f} | {share:.0f} |", flush=True)
        others = [name for name in found if not name.startswith("quantkit") and name != FLOAT]
        best = min(others, key=lambda name: statistics.median(times[name]))
        print(f"quantkit w4g128 is {speedup(times, 'quantkit w4g128', best):.2f} x as fast as {best}")


def bench_conv(rounds: int, clock: Clock) -> None:
    print("\nConvolutions 3 x 3 of 8-bit activations, x float32 convolution of the same values")
    print("| images, channels, size | ms float32 | w8 | w8 expanded | w4 | w4 expanded |\n|---|---|---|---|---|---|")
    for images, channels, side in ((1, 16, 32), (32, 16, 32), (32, 64, 8), (1, 64, 28), (1, 128, 28), (1, 256, 14)):
        x, weight = torch.rand(images, channels, side, side), torch.randn(channels, channels, 3, 3)
        runs: dict[str, Callable[[], Any]] = {FLOAT: lambda x=x, w=weight: F.conv2d(x, w, None, 1, 1)}  # type: ignore
        for scheme in ("w8", "w4"):
            for expand in (False, True):
                flat = quantized(weight.flatten(1), scheme)
                whole = QuantizedWeight(flat.codes.reshape(weight.shape), flat.scale, None, flat.format)
                layer = IntConv(whole, None, SiteRange(1 / 255, 0), expand)
                runs[f"{scheme}{expand}"] = lambda x=x, c=layer: c(F.conv2d, x, 1, 1)  # type: ignore[misc]
        times = interleaved(runs, 3 * rounds, clock)
        cells = " | ".join(f"{speedup(times, name, FLOAT):.2f}" for name in runs if name != FLOAT)
        milliseconds = 1e3 * statistics.median(times[FLOAT])
        print(f"| {images} x {channels} x {side}² | {milliseconds:.2f} | {cells} |", flush=True)


def widened_llama(data: Path) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = json.loads((data / "llama-wiki-5m" / "config.json").read_text())
    factor = 2048 // config["hidden_size"]
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        config[name] *= factor
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**config | {"num_hidden_layers": 4})).eval()


def with_real_layers(model: nn.Module, scheme: str) -> int:
    """Replace every Linear layer; returns the bytes of their weights."""
    held = 0
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                real = IntLinear(quantized(layer.weight.detach(), scheme), layer.bias)
                setattr(module, name, real)
                held += real.weight_bytes
    return held


@torch.no_grad()
def decode(model: nn.Module, tokens: int) -> Tensor:
    """Logits after ``tokens`` greedy tokens that follow a prompt of 16."""
    out = model(input_ids=torch.arange(16).unsqueeze(0), use_cache=True)
    for _ in range(tokens):
        chosen = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=chosen, past_key_values=out.past_key_values, use_cache=True)
    return out.logits


def bench_llama(data: Path, threads: int, rounds: int, clock: Clock, tokens: int = 8) -> None:
    model = widened_llama(data)
    floating = sum(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear))
    real = widened_llama(data)
    held = with_real_layers(real, "w4g128")
    runs = {FLOAT: lambda: decode(model, tokens), "w4g128": lambda: decode(real, tokens)}
    runs |= {f"prompt {FLOAT}": lambda: decode(model, 0), "prompt w4g128": lambda: decode(real, 0)}
    times = interleaved(runs, rounds, clock)
    a_token = {
        name: statistics.median(a - b for a, b in zip(times[name], times[f"prompt {name}"], strict=True)) / tokens
        for name in (FLOAT, "w4g128")
    }
    megabytes = f"{floating / 1e6:.0f} -> {held / 1e6:.0f} MB"
    print(f"\nLlama, hidden 2048, 4 layers, {threads} threads: Linear weights {megabytes}")
    print(f"ms a token: float32 {1e3 * a_token[FLOAT]:.1f}, w4g128 {1e3 * a_token['w4g128']:.1f}: ", end="")
    prompt = speedup(times, "prompt w4g128", f"prompt {FLOAT}")
    print(f"{a_token[FLOAT] / a_token['w4g128']:.2f} x; prompt of 16 tokens {prompt:.2f} x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sizes", type=int, nargs="*", default=[2048, 4096])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--conv", action="store_true")
    parser.add_argument("--llama", action="store_true")
    parser.add_argument("--tiles", type=Path, default=Path("kernel-tiles.json"), help="the GPU's table of tiles")
    asked = parser.parse_args()
    data = Path(os.environ.get("QUANTKIT_DATA", REPOSITORY.parent / "shared" / "data"))
    print(f"kernels: {NAMES.get(instruction_set() or 0, 'none')}, torch {torch.__version__}, numpy {np.__version__}")
    torch.manual_seed(0)
    for threads in asked.threads:
        torch.set_num_threads(threads)
        clock = time.thread_time if threads == 1 else time.perf_counter
        with torch.no_grad():
            for size in asked.sizes:
                bench_linear(size, asked.rows, threads, asked.rounds, clock)
            if asked.conv:
                bench_conv(asked.rounds, clock)
            if asked.llama:
                bench_llama(data, threads, asked.rounds, clock)
    if torch.cuda.is_available():
        from gpu_kernels import bench_gpu  # Triton decides when it is imported whether there is a GPU

        bench_gpu(asked.tiles)
    else:
        print("\nGPU kernels: there is no GPU here, so they are not measured")


if __name__ == "__main__":
    main()
