"""Does this checkout give what another one gives, in the same time and memory? A fixed list of runs, side by side.

    python tools/golden.py [--only NAME ...] [--json FILE]                            # what this checkout gives
    python tools/golden.py --against OTHER_CHECKOUT [--rounds 5] [--only NAME ...]    # and how the other one differs
                           [--rounding nearest]    # every run rounds so: tells a change of GPTQ from one of all else

Of each run: the plan (schemes and sites, not how they came about), codes and scales, the ONNX graph with its
constants, how often the model was called while quantizing and exporting (calls of the model itself: recorded steps
that are replayed are none), KL divergence from the float network on the calibration inputs, CPU time (user and system
of the process; work: without starting and loading) and peak memory of the process, until the result is there and with
the export. Codes differ between CPUs, so nothing is compared with a stored record: both checkouts run here, in turn,
each run in a process of its own on one thread. Ratios are medians over rounds of this checkout / the other one. The
exit code is 1 when anything but time and memory differs, when a run fails, and when there was nothing to run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
COMPARED = ("plan", "codes", "graph", "forwards")
TIMED = ("cpu_s", "work_s", "result_mb", "peak_mb")
NAMED = 3  # differences printed of each kind
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A network and what is asked of it: a budget, or the scheme of every layer. ``evaluated``: with top-1 on unseen
    images.
    """

    what: str
    network: str
    samples: int
    budget: str = ""
    scheme: str = ""
    calibrated: bool = True
    evaluated: bool = False
    options: dict[str, Any] = field(default_factory=dict)


UNLEARNED = {"reconstruction": "none"}
REPQUANT = {"reparameterization": "clip+softmax", "rounding": "gptaq", "reconstruction": "none"}
RUNS = {
    "digits-cnn": Run("the quickstart: digits CNN, 3 bits, learned block by block", "digits_cnn", 256, "3 bits"),
    "digits-vit": Run("digits ViT, 6 bits, not learned", "digits_vit", 128, "6 bits", options=UNLEARNED),
    "digits-latency": Run(
        "digits CNN within a latency, by a stored target file", "digits_cnn", 64, "latency=56%, 8 bits",
        options={"target": "tools/golden_target.yaml", **UNLEARNED},
    ),
    "digits-accuracy": Run(
        "digits CNN, least size that keeps its accuracy", "digits_cnn", 128, "accuracy_drop=1", evaluated=True,
        options=UNLEARNED,
    ),
    "resnet20-4bit": Run("ResNet20, 4 bits, not learned", "resnet20", 64, "4 bits", options=UNLEARNED),
    "resnet20-3bit": Run(
        "ResNet20, 3 bits, the network learned", "resnet20", 64, "3 bits", options={"reconstruction": "network"}
    ),
    "mobilenetv1-w8a8": Run("MobileNetV1, every layer W8A8", "mobilenetv1", 128, scheme="w8a8"),
    "resnet8-no-data": Run("ResNet8, weights at 4.5 bits without data", "resnet8", 64, "4.5 bits", calibrated=False),
    "vit-repquant": Run(
        "hybrid ViT, W4A4 by the parts of RepQuant", "vit_hybrid", 64, scheme="w4a4", options=REPQUANT
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Records of one run in rounds, before (the other checkout) and after (this one)."""

    before: Sequence[Record]
    after: Sequence[Record]

    @property
    def skipped(self) -> str | None:
        return self.after[0].get("skipped")

    @property
    def problems(self) -> dict[str, list[str]]:
        """What differs, and how: between the checkouts, or between the rounds of one; runs that failed."""
        if self.skipped:
            return {}
        sides = {"before": self.before, "after": self.after}
        failed = [f"{side}: {r['failed']}" for side, records in sides.items() for r in records if "failed" in r]
        if failed:
            return {"failed": list(dict.fromkeys(failed))}
        found = differences(self.before[0], self.after[0])
        for side, records in sides.items():
            for record in records[1:]:
                for kind, names in differences(records[0], record).items():
                    found.setdefault(f"{kind} between rounds {side}", names)
        return found

    def ratio(self, figure: str) -> float:
        """After / before, the median over rounds."""
        pairs = zip(self.before, self.after, strict=True)
        return statistics.median(after[figure] / before[figure] for before, after in pairs)

    def to_dict(self) -> dict[str, Any]:
        shown = {"differences": self.problems, "before": list(self.before), "after": list(self.after)}
        measured = not self.skipped and "failed" not in self.problems
        return shown | ({f"{name} ratio": self.ratio(name) for name in TIMED} if measured else {})


def differences(before: Record, after: Record) -> dict[str, list[str]]:
    """Which of plan, codes, graph and forwards differ, and at which names."""
    found = {}
    for kind in COMPARED:
        old, new = before[kind], after[kind]
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        if names:
            found[kind] = [f"{name} {old.get(name, 'absent')} -> {new.get(name, 'absent')}" for name in names]
    return found


def carried_out(run: Run, checkout: Path) -> Record:
    """The record of a run with the quantkit of ``checkout``, in a process of its own."""
    command = [sys.executable, str(REPOSITORY / "tools" / "golden_run.py"), json.dumps(asdict(run))]
    env = os.environ | ONE_THREAD | {"PYTHONPATH": str(checkout)}
    ran = subprocess.run(command, env=env, capture_output=True, text=True)
    if ran.returncode:
        return {"failed": (ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"])[-1]}
    record: Record = json.loads(ran.stdout.splitlines()[-1])
    used = Path(record.get("quantkit", checkout))
    return record if used.is_relative_to(checkout) else {"failed": f"{used} was imported, not that of {checkout}"}


def in_turn(run: Run, other: Path, rounds: int) -> Comparison:
    """The records of both checkouts, which take turns at who begins."""
    before, after = [], []
    for k in range(rounds):
        sides = [(before, other), (after, REPOSITORY)]
        for records, checkout in sides if k % 2 == 0 else reversed(sides):
            records.append(carried_out(run, checkout))
            if "skipped" in records[-1]:
                return Comparison(records, records)
    return Comparison(before, after)


def digest(record: Record, kind: str) -> str:
    text = json.dumps(record[kind], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def print_record(name: str, record: Record) -> None:
    """What one run gives."""
    if reason := record.get("skipped") or record.get("failed"):
        print(f"{name}: {'skipped' if 'skipped' in record else 'failed'}, {reason}", flush=True)
        return
    hashes = ", ".join(f"{kind} {digest(record, kind)}" for kind in ("plan", "codes", "graph"))
    forwards = "; ".join(f"{phase} {count}" for phase, count in record["forwards"].items())
    print(f"{name}: {hashes}\n  forwards: {forwards}\n  KL {record['kl']:.3e}, ", end="")
    print(f"CPU {record['cpu_s']:.1f} s (work {record['work_s']:.1f} s), peak {record['peak_mb']:.0f} MB", flush=True)


def print_comparison(name: str, found: Comparison) -> None:
    """One line of how a run compares, and one for each kind of difference."""
    if found.skipped:
        return print_record(name, found.after[0])
    problems = found.problems
    print(f"{name}: {'different: ' + ', '.join(problems) if problems else 'equal'}")
    for kind, names in problems.items():
        more = f" (and {len(names) - NAMED} more)" if len(names) > NAMED else ""
        print(f"  {kind}: {'; '.join(names[:NAMED])}{more}")
    if "failed" not in problems:
        old, new = found.before[0], found.after[0]
        taken = statistics.median(record["cpu_s"] for record in found.before)
        held = statistics.median(record["peak_mb"] for record in found.before)
        print(
            f"  KL {old['kl']:.4e} before, {new['kl']:.4e} after; CPU {taken:.1f} s x {found.ratio('cpu_s'):.3f}",
            end="",
        )
        print(f" (work x {found.ratio('work_s'):.3f}), peak {held:.0f} MB x {found.ratio('peak_mb'):.3f}", end="")
        print(f" (until the result x {found.ratio('result_mb'):.3f})", flush=True)


def alone(runs: Mapping[str, Run]) -> tuple[dict[str, Any], bool]:
    """The records of this checkout, printed, and whether none failed and some ran."""
    records = {}
    for name, run in runs.items():
        records[name] = carried_out(run, REPOSITORY)
        print_record(name, records[name])
    ran = [record for record in records.values() if "skipped" not in record]
    return records, bool(ran) and not any("failed" in record for record in ran)


def against(other: Path, runs: Mapping[str, Run], rounds: int) -> tuple[dict[str, Any], bool]:
    """The comparisons with another checkout, printed, and whether some ran and nothing differs."""
    found: dict[str, Comparison] = {}
    for name, run in runs.items():
        found[name] = in_turn(run, other, rounds)
        print_comparison(name, found[name])
    ran = {name: one for name, one in found.items() if not one.skipped}
    timed = [one for one in ran.values() if "failed" not in one.problems]
    shown: dict[str, Any] = {"runs": {name: one.to_dict() for name, one in found.items()}}
    if timed:
        shown["geometric means"] = {f: statistics.geometric_mean([one.ratio(f) for one in timed]) for f in TIMED}
        cpu, work, result, peak = shown["geometric means"].values()
        print(f"geometric means of {len(timed)} runs: CPU x {cpu:.3f} (work x {work:.3f}), peak x {peak:.3f} ", end="")
        print(f"(until the result x {result:.3f})")
    different = [name for name, one in ran.items() if one.problems]
    print(f"{len(ran) - len(different)} of {len(ran)} runs equal" + "".join(f"; different: {n}" for n in different))
    return shown, bool(ran) and not different


def listed(runs: Mapping[str, Run]) -> str:
    width = max(map(len, runs))
    return "\n".join(f"{name:<{width}}  {run.what} ({run.samples} samples)" for name, run in runs.items())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="compare with another checkout of quantkit")
    parser.add_argument("--rounds", type=int, default=5, help="how often each side runs, with --against (default 5)")
    parser.add_argument("--only", nargs="+", choices=RUNS, metavar="NAME", help="only these runs (--list names them)")
    parser.add_argument("--rounding", help="of every run, instead of its own")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything there")
    parser.add_argument("--list", action="store_true", help="name the runs")
    options = parser.parse_args(arguments)
    if options.list:
        print(listed(RUNS))
        return 0
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: at least 1.")
    if options.against and not (options.against / "quantkit" / "__init__.py").exists():
        parser.error(f"{options.against} is no checkout of quantkit: it has no quantkit/__init__.py.")
    chosen = {name: RUNS[name] for name in options.only or RUNS}
    if options.rounding:
        chosen = {n: replace(run, options=run.options | {"rounding": options.rounding}) for n, run in chosen.items()}
    other = options.against and options.against.resolve()
    shown, fine = against(other, chosen, options.rounds) if other else alone(chosen)
    if options.json:
        options.json.write_text(json.dumps(shown, indent=1) + "\n")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
