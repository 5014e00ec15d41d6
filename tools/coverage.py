"""What can be quantized, exported and run? A zoo of networks with random weights, each asked for one budget.

    python tools/coverage.py [--only NAME ...] [--family plain ...] [--list] [--json FILE] [--markdown FILE]

Every network runs in a process of its own under a time limit and a memory bound. With ``--json`` finished networks are
kept, a line each, and skipped by the next run. ``share`` is that of the weights stored at 8 bits or fewer: of all
elements of floating-point parameters of two or more dimensions, ties once, without tables that are only added or
multiplied element by element. ``kernels`` are the products that onnxruntime's optimized graph computes in integers,
``sizes`` the dimensions of inputs that the file leaves open, ``error`` the relative root mean square error of the file
against the quantized model on inputs that nothing was decided on, without optimization, the worst of all outputs;
``noise`` is that of the quantized model against itself under another rounding of its sums, with the share of an output
that such roundings decide, as the order of equal scores. Seconds are of the CPU. Where a network cannot be exported,
torch's own exporter is tried on the float model.

Needs what the extra ``zoo`` installs; a network whose library is absent is left out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from zoo.every import ZOO
from zoo.measure import Record, measure
from zoo.table import line_of, markdown, summary

FAMILIES = ("plain", "transformers", "torchvision", "timm")
PATIENCE = 20  # seconds of the clock for each of the CPU: other work may go on beside
PRELOADED = ["zoo.measure", "zoo.every", "zoo.warm", "onnxruntime"]


@dataclass(frozen=True)
class Asked:
    """What every network is asked for, and what its process may take."""

    budget: str
    limit_s: int
    memory_gb: float


def child(name: str, sender: Connection, asked: Asked) -> None:
    """Measure one network and send what is known, piece by piece."""
    most = int(asked.memory_gb * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (asked.limit_s, asked.limit_s + 5))
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # exporters talk
        os.dup2(nothing, stream)
    measure(ZOO[name], asked.budget, sender.send)
    sender.close()


def outcome(name: str, asked: Asked) -> Record:
    """Everything that is known of a network after its process has ended, or has been ended."""
    found: Record = {"name": name, "family": ZOO[name].family}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(name, sender, asked))
    start = time.monotonic()
    end = start + PATIENCE * asked.limit_s
    process.start()
    sender.close()
    for piece in received(receiver, end):
        found.update(piece)
    process.join(timeout=max(0.0, end - time.monotonic()))
    stopped = process.is_alive()
    if stopped:
        process.kill()
        process.join()
    if stopped or process.exitcode == -signal.SIGXCPU:
        found["failure"] = {"type": "Timeout", "line": f"not finished after {asked.limit_s} s", "deliberate": False}
    elif process.exitcode:
        found["failure"] = {"type": "Ended", "line": f"exit code {process.exitcode}", "deliberate": False}
    return found | {"wall_seconds": time.monotonic() - start}


def received(receiver: Connection, end: float) -> Iterator[Record]:
    """What a process sends until it closes its end, or until the time is over."""
    while receiver.poll(max(0.0, end - time.monotonic())):
        try:
            yield receiver.recv()
        except EOFError:
            return


def kept(path: Path | None) -> dict[str, Record]:
    """Finished networks by name."""
    if path is None or not path.exists():
        return {}
    return {found["name"]: found for found in map(json.loads, path.read_text().splitlines())}


def arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=ZOO, help="only these networks")
    parser.add_argument("--family", nargs="+", choices=FAMILIES)
    parser.add_argument("--list", action="store_true", help="name the networks and stop")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep finished networks here, and skip them")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table here")
    parser.add_argument("--budget", default="6 bits", help="what every network is asked for")
    parser.add_argument("--limit", type=int, default=180, metavar="SECONDS", help="of the CPU, for one network")
    parser.add_argument("--memory", type=float, default=8, metavar="GB", help="of one network")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    names = [n for n in options.only or ZOO if not options.family or ZOO[n].family in options.family]
    names.sort(key=lambda name: FAMILIES.index(ZOO[name].family))
    if options.list:
        print("\n".join(names))
        return 0
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # what the process that forks the others imports from
    done, asked = kept(options.json), Asked(options.budget, options.limit, options.memory)
    for name in names:
        if name in done:
            continue
        found = outcome(name, asked)
        if found.get("failure", {}).get("type") in ("ImportError", "ModuleNotFoundError"):
            print(f"{name}: left out, {found['failure']['line']}", flush=True)
            continue
        done[name] = found
        print(line_of(found), flush=True)
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(found) + "\n")
    records = [done[name] for name in names if name in done]
    print("\n" + "\n".join(summary(records)))
    if options.markdown:
        options.markdown.write_text(markdown(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
