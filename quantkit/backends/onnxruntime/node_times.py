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

from quantkit.backends.onnxruntime.sessions import feeds, open_session
from quantkit.program.inputs import Batch

WARMUP_ROUNDS = 2
LEAST_ROUNDS = 8
# What disturbs a run only lengthens it. A low quantile is what undisturbed runs take, and steadier than the least.
QUANTILE = 0.25
NODE_QUANTILE = 0.1


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


def measure_files(paths: Sequence[Path], batch: Batch, threads: int, seconds: float) -> list[FileTimes]:
    """Times of every file on ``batch``. The first file is the reference: it runs just before each run of another one,
    and what counts is their ratio, since a machine may be slower for seconds. Rounds go on for so many seconds, at
    least ``LEAST_ROUNDS`` of them.
    """
    profiled = [
        open_session(path, threads, save_optimized=f"{path}.optimized", profile=f"{path}.profile") for path in paths
    ]
    plain = [open_session(path, threads) for path in paths]
    inputs = [feeds(session, batch) for session in plain]
    now = clock(threads)

    def timed(k: int) -> int:
        start = now()
        plain[k].run(None, inputs[k])
        return now() - start

    def row(k: int) -> tuple[int, int]:
        """(the reference, the file just after it), behind a profiled run of the file."""
        profiled[k].run(None, inputs[k])
        return timed(0), timed(k)

    for _ in range(WARMUP_ROUNDS):
        for one, values in zip([*profiled, *plain], inputs * 2, strict=True):
            one.run(None, values)
    end = time.monotonic() + seconds
    pairs: list[list[tuple[int, int]]] = []
    while len(pairs) < LEAST_ROUNDS or time.monotonic() < end:
        pairs.append([row(k) for k in range(len(paths))])
    times = np.array(pairs, dtype=np.float64)  # round, file, reference or file
    reference = float(np.quantile(times[:, :, 0], QUANTILE))
    totals = reference * np.median(times[:, :, 1] / times[:, :, 0], axis=0)
    return [
        FileTimes(
            onnx.load(f"{path}.optimized", load_external_data=False).graph,
            _node_times(session.end_profiling()),
            float(total),
            len(pairs),
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
    return {name: float(np.quantile(found, NODE_QUANTILE)) for name, found in durations.items()}
