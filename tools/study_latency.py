"""Does a plan take as long as predicted? Plans at five budgets run in onnxruntime in turn with the float network.

    python tools/study_latency.py [--models resnet20 resnet8 mobilenetv1 digits] [--seconds 40] [--rounds 40]

For every network it measures a latency table, as ``quantkit bench`` does; finds the smallest latency that a plan can
have by it; and at five budgets from there to 95 % of the float network the plan with the least predicted damage. All
plans, the float network among them, then run in turn, and the table compares the ratios to float: predicted, measured,
and by how much the prediction is off. Last comes ``latency=60%``: the plan found, or the smallest that a plan can
reach, both measured; with ``--size`` a limit on the size beside it.

Layers may have 4, 6 or 8 bits, or stay float. Damages are those of a profile on 32 calibration images with weights
rounded to nearest: what matters here is that the plans differ.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from golden_run import recipe_model
from safetensors.torch import load_file
from study_sensitivity import REPOSITORY, SOURCES
from torch import Tensor, nn

from quantkit.allocation.allocate import allocate
from quantkit.api import apply, profile
from quantkit.backends.onnxruntime.marks import MarkedGraph, mark_graph
from quantkit.backends.onnxruntime.node_times import clock
from quantkit.backends.onnxruntime.sessions import feeds, open_session
from quantkit.backends.onnxruntime.writer import ExportOptions, export_float, export_onnx
from quantkit.errors import InfeasibleBudget
from quantkit.plan import Plan, Profile
from quantkit.program.inputs import Batch, first_samples
from quantkit.stages.bench import bench
from quantkit.stages.result import Result
from quantkit.targets import Target

BUDGETS = 5
HIGHEST = 95.0  # percent of float
ASKED = 60.0
SAMPLES = 32
SCHEMES = ["w4a8", "w6a8", "w8a8"]
DIGITS = "digits"


@dataclass(frozen=True)
class Network:
    """A model with its calibration images."""

    model: nn.Module
    images: Tensor


def network(name: str, data: Path) -> Network:
    if name == DIGITS:
        recipe = recipe_model("digits_cnn")
        arrays = np.load(REPOSITORY / "calibration" / "digits.npz")
        images = recipe.preprocess(arrays["images"][arrays["calibration"]])
        weights = REPOSITORY / "calibration" / "digits_cnn.safetensors"
    else:
        recipe = recipe_model(name)
        file, images_file, array, _, _ = SOURCES[name]
        images = recipe.preprocess(np.load(data / images_file)[array])
        weights = data / file
    model = recipe.build()
    model.load_state_dict(load_file(weights))
    return Network(model, images[:SAMPLES])


def measured_profile(own: Network, target: Target) -> Profile:
    return profile(own.model, own.images, schemes=SCHEMES, target=target, rounding="nearest", progress=False)


def plans_of(measured: Profile, size: str | None) -> tuple[dict[str, Plan], float]:
    """Plans by what was asked, and the smallest latency in percent of float."""
    try:
        allocate(measured, "latency=0.1%")
        raise SystemExit("a plan takes no time")
    except InfeasibleBudget as error:
        least = error.smallest
    amounts = [least + (HIGHEST - least) * k / (BUDGETS - 1) for k in range(BUDGETS)]
    plans = {f"{amount:.1f}%": allocate(measured, f"latency={amount:.3f}%") for amount in amounts}
    if least <= ASKED:
        plans[f"latency={ASKED:g}%"] = allocate(measured, f"latency={ASKED}%")
    if size is not None:
        both = f"latency={max(least, ASKED) + 5:.1f}%, {size}"
        plans[both] = allocate(measured, both)
    return plans, least


def times_in_turn(paths: Mapping[str, Path], batch: Batch, rounds: int) -> dict[str, float]:
    """Median over rounds of each file's time relative to that of the float file just before it, one thread."""
    sessions = {name: open_session(path, 1) for name, path in paths.items()}
    inputs = {name: feeds(session, batch) for name, session in sessions.items()}
    now, ratios = clock(1), []

    def timed(name: str) -> int:
        start = now()
        sessions[name].run(None, inputs[name])
        return now() - start

    def ratio(name: str) -> float:
        reference = timed("float")
        return timed(name) / reference

    for _ in range(rounds + 2):
        ratios.append([ratio(name) for name in sessions])
    return dict(zip(sessions, np.median(ratios[2:], axis=0).tolist(), strict=True))  # the first are for warming up


def exported(own: Network, plans: Mapping[str, Plan], target: Target, folder: Path) -> dict[str, tuple[Path, Result]]:
    """The ONNX file of every plan, as users get it, compared with its simulation on the way."""
    found = {}
    for k, (name, plan) in enumerate(plans.items()):
        free = replace(plan, size_bytes=0)
        result = apply(
            own.model, free, own.images, target=target, rounding="nearest", reconstruction="none", progress=False
        )
        path = folder / f"{k}.onnx"
        checked, domains = [first_samples(result.example(), 16)], result.operator_domains
        options = ExportOptions(result.instruction_set, checked, plan=plan, domains=domains)
        export_onnx(result.simulated(), result.example(), path, options)
        found[name] = path, result
    return found


def float_file(own: Network, result: Result, folder: Path) -> Path:
    graph: MarkedGraph = mark_graph(result.simulated(), result.example())
    return export_float(result.simulated(), result.example(), folder / "float.onnx", graph=graph)


def study(name: str, options: argparse.Namespace, data: Path) -> None:
    """Print the table of one network."""
    own = network(name, data)
    target = bench(own.model, own.images, batch=options.batch, seconds=options.seconds, progress=False)
    measured = measured_profile(own, target)
    plans, least = plans_of(measured, options.size if name == "resnet20" else None)
    with TemporaryDirectory() as text:
        folder = Path(text)
        files = exported(own, plans, target, folder)
        paths = {"float": float_file(own, next(iter(files.values()))[1], folder)}
        paths |= {asked: path for asked, (path, _) in files.items()}
        batch = first_samples((((own.images),), {}), options.batch)
        ratios = times_in_turn(paths, batch, options.rounds)
    print(f"\n{name}, batch {options.batch}, one thread: smallest latency {least:.1f}% of float, {ASKED:g}% ", end="")
    print("can be met" if least <= ASKED else "is refused")
    print(f"{'asked':28} {'predicted':>9} {'measured':>9} {'error':>7} {'float layers':>13} {'average bits':>13}")
    for asked, plan in plans.items():
        print(row(asked, plan, ratios[asked]), flush=True)


def row(asked: str, plan: Plan, ratio: float) -> str:
    predicted = plan.provenance["latency_ratio"]
    floats = sum(scheme.is_float for scheme in plan.schemes.values())
    return (
        f"{asked:28} {predicted:9.3f} {ratio:9.3f} {predicted / ratio - 1:+7.1%} {floats:6} of {len(plan.schemes):3} "
        f"{plan.average_bits:13.3f}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=[*SOURCES, DIGITS], default=[*SOURCES, DIGITS])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=40.0, help="of measuring for each latency table (default 40)")
    parser.add_argument("--rounds", type=int, default=40, help="in which the plans run in turn (default 40)")
    parser.add_argument("--size", default="150 KB", help="the limit beside that on latency, for ResNet20")
    options = parser.parse_args(arguments)
    torch.set_num_threads(2)
    data = Path(os.environ.get("QUANTKIT_DATA", REPOSITORY.parent / "shared" / "data"))
    for name in options.models:
        study(name, options, data)


if __name__ == "__main__":
    main()
