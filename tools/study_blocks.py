"""How much does GPTQ lose where X^T X is kept in blocks of inputs, as that of wide layers is?

    python tools/study_blocks.py [--bits 4 3 2] [--blocks 1 2 4 8 16] [--unseen 512]

ResNet20 and the small language model: every layer is rounded on the float network's inputs, with its inputs in so many
blocks (of whole kernels) however narrow it is. KL divergence from the float network on inputs that decided nothing,
over that with one block. Activations stay float. "none" is rounding to nearest.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from golden_run import case_of, recipe_model
from study_gptq import calibration_windows, language_model, unseen_windows
from torch import Tensor, nn

from quantkit.formats import WeightFormat
from quantkit.program.inputs import Batch, split_batches
from quantkit.program.layers import LayerWeight
from quantkit.ranges.statistics import layer_hessians
from quantkit.rounding import Moments
from quantkit.rounding.blocks import Blocks
from quantkit.rounding.weights import quantize_weight
from quantkit.simulation.model import SimulatedModel
from quantkit.targets import Target
from quantkit.transforms.prepare import Prepared, prepare

REPOSITORY = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("QUANTKIT_DATA", REPOSITORY.parent / "shared" / "data"))
BATCH = 32
NEAREST = 0  # blocks


def resnet20(unseen: int) -> tuple[nn.Module, list[Batch], list[Batch]]:
    case = case_of("resnet20", 256)
    images = recipe_model("resnet20").preprocess(np.load(DATA / "cifar10_test_a.npz")["images"][:unseen])
    return case.model, batches_of(case.images), batches_of(images)


def llama(unseen: int) -> tuple[nn.Module, list[Batch], list[Batch]]:
    model = language_model(DATA)
    return model, batches_of(calibration_windows(DATA, 32, 0)), batches_of(unseen_windows(DATA, unseen // 32))


def batches_of(x: Tensor) -> list[Batch]:
    return split_batches([((x,), {})], BATCH)


def in_blocks(moments: Moments, weight: LayerWeight, count: int) -> Moments:
    """The diagonal blocks of a layer's X^T X."""
    kernel, inputs = math.prod(weight.shape[2:]), math.prod(weight.shape[1:])
    width = kernel * math.ceil(inputs // kernel / count)
    blocks = Blocks(math.ceil(inputs / width), width)
    found = torch.zeros(len(moments.hessian) * blocks.count, width, width, dtype=torch.float64)
    for b, span in enumerate(blocks.spans(inputs)):
        size = span.stop - span.start
        found[b :: blocks.count, :size, :size] = moments.hessian[:, span, span]
    return Moments(found, count=blocks.count)


def rounded(ready: Prepared, every: dict[str, Moments], bits: int, count: int) -> SimulatedModel:
    """The network with all layers rounded in so many blocks, to nearest where that is none."""
    own = copy.deepcopy(ready.model)
    model = SimulatedModel(own, (), {}, {}, ready.weights.on(own))
    for name, moments in every.items():
        layer, format = ready.weights.layers[name], WeightFormat(str(bits))
        seen = None if count == NEAREST else in_blocks(moments, layer, count)
        found = quantize_weight(ready.weights[name], [format], seen, layer.groups)
        model.set_weight(name, found.weights[format])
    return model


@torch.no_grad()
def kl(ready: Prepared, model: nn.Module, batches: Sequence[Batch]) -> float:
    """Mean KL divergence from the float network, over all rows."""
    rows = []
    for args, kwargs in batches:
        p, q = (logits(m(*args, **kwargs)).double().log_softmax(-1) for m in (ready.model, model))
        rows.append((p.exp() * (p - q)).sum(-1).flatten())
    return float(torch.cat(rows).mean())


def logits(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits  # type: ignore[attr-defined]


def study(build: Callable[[int], tuple[nn.Module, list[Batch], list[Batch]]], asked: argparse.Namespace) -> None:
    model, seen, unseen = build(asked.unseen)
    ready = prepare(model.eval(), seen, Target.load("onnxruntime-cpu"))
    floats = SimulatedModel(ready.model, (), {}, {}, ready.weights)
    every = layer_hessians(floats, ready.program, ready.quantizable, seen)
    widths = sorted({math.prod(ready.weights.layers[name].shape[1:]) for name in every})
    print(f"{build.__name__}: {len(every)} layers of {widths[0]} to {widths[-1]} inputs")
    for bits in asked.bits:
        found = {n: kl(ready, rounded(ready, every, bits, n), unseen) for n in (*asked.blocks, NEAREST)}
        cells = (f"{n or 'none'}: {value:.4f} ({value / found[asked.blocks[0]]:.2f} x)" for n, value in found.items())
        print(f"  {bits} bits   {'   '.join(cells)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2])
    parser.add_argument("--blocks", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--unseen", type=int, default=512, help="images, and windows of text for every 32 of them")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for build in (resnet20, llama):
        study(build, asked)


if __name__ == "__main__":
    main()
