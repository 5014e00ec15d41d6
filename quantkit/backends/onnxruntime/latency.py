"""How much faster is the quantized file? Both run in turn, in one process: what disturbs one disturbs the other."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.backends.onnxruntime.node_times import clock
from quantkit.backends.onnxruntime.sessions import feeds, open_session
from quantkit.program.inputs import Batch

WARMUP_ROUNDS = 3


@dataclass(frozen=True)
class LatencyRatio:
    """Median time of a run of each file, and the median over rounds of quantized / float time (below 1 is faster)."""

    float_ms: float
    quantized_ms: float
    ratio: float


def measure_latency_ratio(
    float_path: str | Path, quantized_path: str | Path, batch: Batch, *, threads: int = 1, rounds: int = 30
) -> LatencyRatio:
    """Run two ONNX files with the same inputs on ``batch`` alternately for ``rounds`` rounds, after a warm-up. One
    thread's time is what it works, so that other processes do not count.
    """
    runs = [_runner(path, batch, threads) for path in (float_path, quantized_path)]
    for _ in range(WARMUP_ROUNDS):
        for run in runs:
            run()
    now = clock(threads)
    times = [tuple(_milliseconds(run, now) for run in runs) for _ in range(rounds)]
    return LatencyRatio(
        float_ms=statistics.median(base for base, _ in times),
        quantized_ms=statistics.median(quantized for _, quantized in times),
        ratio=statistics.median(quantized / base for base, quantized in times),
    )


def _runner(path: str | Path, batch: Batch, threads: int) -> Callable[[], Any]:
    session = open_session(path, threads)
    inputs = feeds(session, batch)
    return lambda: session.run(None, inputs)


def _milliseconds(run: Callable[[], Any], now: Callable[[], int]) -> float:
    start = now()
    run()
    return (now() - start) / 1e6
