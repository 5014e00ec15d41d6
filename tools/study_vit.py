"""What does each part of RepQuant save of a vision transformer? Top-1 on unseen images, simulated and in onnxruntime.

    python tools/study_vit.py [--bits 8 6 4] [--rows plain all ...] [--onnx] [--unseen 5000] [--samples 1024]

Weights, activations and both products of attention of the hybrid ViT get the same bits; its first layer reads 8 bits.
Nothing is learned after rounding, so that the parts are seen alone. ``norm``: a range for each channel behind
LayerNorms; ``clip``: their clipping learned; ``reads``: a ratio for each channel of what layers read; ``softmax``:
logarithmic probabilities; ``all`` has the fourth part too, weights rebuilt for the quantized inputs (rounding "gptaq":
the ridge solution, then GPTQ) instead of rounded to nearest. Quantized on unlabelled training images, measured on
images that decided nothing. ``--outliers`` first gives the network channels 15 to 60 times as large behind its norms,
which leaves what it computes as it is (outliers.py of the benchmark data).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from pathlib import Path

import numpy as np
import torch
from golden_run import recipe_model
from safetensors.torch import load_file
from study_quantizers import equal_answers, outputs, outputs_in_onnxruntime
from torch import Tensor, nn

import quantkit
from quantkit.targets import Target
from quantkit.transforms.prepare import prepare

REPOSITORY = Path(__file__).resolve().parent.parent
# row -> reparameterization, rounding
ROWS = {
    "plain": ("none", "nearest"),
    "norm": ("norm", "nearest"),
    "clip": ("clip", "nearest"),
    "clip+softmax": ("clip+softmax", "nearest"),
    "clip+reads": ("clip+reads", "nearest"),
    "all": ("clip+softmax", "gptaq"),
    "all and reads": ("clip+reads+softmax", "gptaq"),
    "all but norm": ("softmax", "gptaq"),
    "all but clip": ("norm+softmax", "gptaq"),
    "all but softmax": ("clip", "gptaq"),
    "gptq, no ridge": ("clip+softmax", "gptq"),
    "plain gptq": ("none", "gptq"),
    "plain gptaq": ("none", "gptaq"),
    "default": ("auto", "auto"),
}


def plan_of(model: nn.Module, images: Tensor, bits: int) -> quantkit.Plan:
    """Every layer and every other site at ``bits``, the first layer reading 8."""
    ready = prepare(model, [((images[:4],), {})], Target.load("onnxruntime-cpu"))
    first, *others = ready.quantizable
    schemes = {first: f"w{bits}a8"} | dict.fromkeys(others, f"w{bits}a{bits}")
    sites = {site.name: f"a{bits}" for site in ready.sites if not site.consumers}
    return quantkit.Plan(schemes=quantkit.Plan.of(schemes).schemes, sites=sites)


def with_outliers(weights: dict[str, Tensor], data: Path) -> dict[str, Tensor]:
    """The weights of the same function with large channels, by the benchmark data's own module."""
    spec = importlib.util.spec_from_file_location("outliers", data / "outliers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, Tensor] = module.vit_inject(weights)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", nargs="+", type=int, default=[4])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[row for row in ROWS if row != "default"])
    parser.add_argument("--onnx", action="store_true", help="also export, and measure in onnxruntime")
    parser.add_argument("--unseen", type=int, help="only so many of the evaluation images")
    parser.add_argument("--samples", type=int, help="only so many of the calibration images")
    parser.add_argument("--outliers", action="store_true", help="a network with large channels behind its norms")
    options = parser.parse_args()
    data = Path(os.environ.get("QUANTKIT_DATA", REPOSITORY.parent / "shared" / "data"))
    recipe = recipe_model("vit_hybrid")
    model = recipe.build()
    weights = load_file(data / "vit_hybrid_cifar10.safetensors")
    model.load_state_dict(with_outliers(weights, data) if options.outliers else weights)
    calibration = recipe.preprocess(np.load(data / "cifar10_calib.npz")["images"][: options.samples])
    held = np.load(data / "cifar10_test_a.npz")
    images = recipe.preprocess(held["images"][: options.unseen])
    labels = torch.from_numpy(held["labels"][: options.unseen]).long()
    print(f"float top-1 {equal_answers(outputs(model, images), labels):.2f}")
    print(
        "| bits | parts | norms rewritten | log sites | top-1 | onnxruntime | seconds |\n|---|---|---|---|---|---|---|"
    )
    for bits in options.bits:
        plan = plan_of(model, calibration, bits)
        for row in options.rows:
            way, rounding = ROWS[row]
            start = time.perf_counter()
            result = quantkit.apply(
                model, plan, calibration, reparameterization=way, rounding=rounding, progress=False,
                reconstruction="none", correction="none", transforms="auto" if row == "default" else "none",
            )  # fmt: skip
            seconds = time.perf_counter() - start
            notes = result.notes.get("reparameterization", {}).values()
            rewritten = sum("not rewritten" not in note for note in notes)
            log = sum(fmt == "alog4" for fmt in result.plan.sites.values())
            found, runtime = equal_answers(outputs(result.model, images), labels), "-"
            if options.onnx:
                runtime = f"{equal_answers(outputs_in_onnxruntime(result, images), labels):.2f}"
            print(f"| {bits} | {row} | {rewritten} | {log} | {found:.2f} | {runtime} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
