"""What does onnxruntime's GatherBlockQuantized gain over look-ups by standard operators, in memory and in time?

    python tools/study_tables.py [--rounds 15]

Embeddings alone are quantized and exported: with standard operators, which expand codes to bytes when a file is
loaded, and with the operator. quantkit writes that for 4 bits; for 2 and 8 bits the file is made here. The table has
what a session adds to the memory of a process of its own (Linux), and the time of a run that looks up so many rows, in
turn on one thread, standard / operator. Outputs of both files are the same bit for bit, or the command stops.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import quantkit
from quantkit.backends.onnxruntime.block_lookup import DOMAIN
from quantkit.backends.onnxruntime.node_times import clock
from quantkit.backends.onnxruntime.sessions import open_session
from quantkit.numbers.uniform import QuantizedWeight
from quantkit.targets import Target

SIZES = ((5_000, 64), (50_000, 256))  # rows, width
SCHEMES = ("w4g32", "w4g32z", "w4", "w2g32", "w8g32")
LOOKED_UP = ((1, 1), (1, 128), (8, 128))  # shapes of indices
RUNS = 20  # timed at once
BYTE = 8


class Table(nn.Module):
    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids) + 0.5


def packed(codes: Tensor, bits: int) -> np.ndarray:
    """Codes (rows, width) as bytes around the middle code, the first of a byte in its low bits."""
    fields = (codes.int() + (1 << bits - 1)).reshape(len(codes), -1, BYTE // bits)
    shifts = torch.arange(0, BYTE, bits)
    return (fields << shifts).sum(-1).to(torch.uint8).numpy()


def by_operator(weight: QuantizedWeight, path: Path) -> Path:
    """A file that looks rows up in bytes, without zero points."""
    bits, (_, width) = weight.format.bits, weight.codes.shape
    node = helper.make_node(
        "GatherBlockQuantized", ["table", "ids", "scale"], ["rows"], domain=DOMAIN,
        gather_axis=0, quantize_axis=1, bits=bits, block_size=width // weight.scale.shape[1],
    )  # fmt: skip
    tensors = {"table": packed(weight.codes, bits), "scale": weight.scale.numpy(), "half": np.float32(0.5)}
    graph = helper.make_graph(
        [node, helper.make_node("Add", ["rows", "half"], ["output"])],
        "table",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "ids"])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )
    domains = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=10), path)
    return path


def files_of(rows: int, width: int, scheme: str, folder: Path) -> list[Path]:
    """The file with standard operators, and the one with the operator."""
    torch.manual_seed(0)
    model, ids = Table(rows, width).eval(), torch.zeros(1, 4, dtype=torch.int64)
    found = []
    for name, domains in (("standard", ()), ("operator", (DOMAIN,))):
        target = replace(Target.load("onnxruntime-cpu"), operator_domains=domains)
        made = quantkit.quantize(model, scheme, [ids], target=target, rounding="nearest", progress=False)
        path = folder / f"{name}.onnx"
        if domains and "4" not in scheme.partition("g")[0]:
            (weight,) = made.simulated().weights.values()
            found.append(by_operator(weight, path))
        else:
            found.append(made.export_onnx(path, dynamic={"ids": {1: "ids"}}).path)
    return found


def times(paths: Sequence[Path], rows: int, rounds: int) -> str:
    """Microseconds of runs, standard / operator, for each number of rows."""
    sessions, now, cells = [open_session(path, threads=1) for path in paths], clock(1), []
    for shape in LOOKED_UP:
        ids = np.random.default_rng(0).integers(0, rows, shape)
        outputs = [session.run(None, {"ids": ids})[0] for session in sessions]
        assert np.array_equal(*outputs), "the operator computes something else"
        taken = []
        for _ in range(rounds):
            row = []
            for session in sessions:
                start = now()
                for _ in range(RUNS):
                    session.run(None, {"ids": ids})
                row.append((now() - start) / RUNS / 1e3)
            taken.append(row)
        cells.append(" / ".join(f"{statistics.median(column):.0f}" for column in zip(*taken, strict=True)))
    return " | ".join(cells)


def resident_mb() -> float:
    """What this process holds in memory, after giving back what is free."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmRSS"))


def print_memory(path: Path, other: Path) -> None:
    """What a session on a file adds, once another one has loaded what all need."""
    one = open_session(other, threads=1)
    before = resident_mb()
    session = open_session(path, threads=1)
    for each in (one, session):
        each.run(None, {"ids": np.zeros((1, 4), np.int64)})
    print(f"{resident_mb() - before:.1f}")


def memory(path: Path, other: Path) -> str:
    command = [sys.executable, __file__, "--memory", str(path), str(other)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each file (default 15)")
    parser.add_argument("--memory", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print_memory(*options.memory)
        return
    torch.set_num_threads(1)
    print("| rows | width | scheme | file, MB | memory, MB | 1 row, us | 128 rows | 1024 rows |\n" + "|---" * 8 + "|")
    for rows, width in SIZES:
        for scheme in SCHEMES:
            with TemporaryDirectory() as folder:
                small = files_of(8, 32, "w8", Path(folder))[0].rename(Path(folder) / "small.onnx")
                paths = files_of(rows, width, scheme, Path(folder))
                sizes = " / ".join(f"{path.stat().st_size / 1e6:.2f}" for path in paths)
                held = " / ".join(memory(path, small) for path in paths)
                taken = times(paths, rows, options.rounds)
            print(f"| {rows:,} | {width} | {scheme} | {sizes} | {held} | {taken} |", flush=True)


if __name__ == "__main__":
    main()
