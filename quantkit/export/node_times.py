"""What each node of several files takes in onnxruntime, and each file as a whole: all run in turn, in one process."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from quantkit.export.sessions import feeds, open_session
from quantkit.graph.batches import Batch

WARMUP_ROUNDS = 2
# What disturbs a run only lengthens it. The lower quartile is what undisturbed runs take, and steadier than the least.
QUANTILE = 0.25


@dataclass(frozen=True)
class FileTimes:
    """One file: the graph that ran, nanoseconds of each of its nodes by name, and of a whole run without profiling;
    how many runs that is from, on how many threads.
    """

    graph: onnx.GraphProto
    nodes: dict[str, float]
    total_ns: float
    rounds: int
    threads: int


def clock(threads: int) -> Callable[[], int]:
    """Nanoseconds that pass: on one thread those it works, so that other processes do not count."""
    return time.thread_time_ns if threads == 1 else time.perf_counter_ns


def measure_files(
    paths: Sequence[Path], batch: Batch, threads: int, seconds: float, least: int = 8
) -> list[FileTimes]:
    """Times of every file on ``batch``, from rounds in which each runs once with and once without profiling; rounds go
    on for so many seconds, at least ``least`` of them.
    """
    profiled = [
        open_session(path, threads, save_optimized=f"{path}.optimized", profile=f"{path}.profile") for path in paths
    ]
    plain = [open_session(path, threads) for path in paths]
    inputs = [feeds(session, batch) for session in plain]
    now = clock(threads)
    totals: list[list[int]] = [[] for _ in paths]
    for _ in range(WARMUP_ROUNDS):
        for one, values in zip([*profiled, *plain], inputs * 2, strict=True):
            one.run(None, values)
    end, rounds = time.monotonic() + seconds, 0
    while rounds < least or time.monotonic() < end:
        for k, values in enumerate(inputs):
            profiled[k].run(None, values)
            start = now()
            plain[k].run(None, values)
            totals[k].append(now() - start)
        rounds += 1
    return [
        FileTimes(
            onnx.load(f"{path}.optimized").graph,
            _node_times(session.end_profiling()),
            float(np.quantile(total, QUANTILE)),
            rounds,
            threads,
        )
        for path, session, total in zip(paths, profiled, totals, strict=True)
    ]


def _node_times(path: str) -> dict[str, float]:
    """Nanoseconds by node name from a profile that onnxruntime wrote."""
    durations: dict[str, list[float]] = defaultdict(list)
    events: list[dict[str, Any]] = json.loads(Path(path).read_text(encoding="utf-8"))
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            durations[event["name"].removesuffix("_kernel_time")].append(1e3 * event["dur"])
    return {name: float(np.quantile(found, QUANTILE)) for name, found in durations.items()}
