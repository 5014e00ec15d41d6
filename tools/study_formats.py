"""What do number formats of weights cost a language model: types of scales, groups, FP8, NVFP4, MXFP4?

    python tools/study_formats.py [--schemes w4g64z w4g64zsf8 ...] [--rounding gptq nearest] [--windows 48]
        [--unseen 16]

The small Llama of the benchmark data (QUANTKIT_DATA): every linear layer is rounded on the float network's inputs, one
Hessian for all formats; embedding, head and activations stay float. Bits of a weight with all that belongs to its
scales, relative error of the weights, KL divergence per token from the float network on text that decided nothing, and
the ratio of perplexities. Needs transformers.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformer_study.scores import next_tokens
from transformer_study.subjects import Places, SmallLlama

from quantkit.formats import Scheme, WeightFormat
from quantkit.rounding import Moments
from quantkit.rounding.weights import quantize_weight

SCALES = tuple(
    f"w{bits}g{group}z{scale}" for bits in (4, 3, 2) for group in (64, 32) for scale in ("sf32", "", "si8", "sf8")
)
FLOATS = ("w4g16sf8", "w4g32", "wnvfp4", "wmxfp4", "w8", "wfp8", "wfp8e5m2")
HEAD = "lm_head"


@torch.no_grad()
def moments_of(model: nn.Module, linears: Mapping[str, nn.Linear], windows: Tensor) -> dict[str, Moments]:
    """X^T X over what each layer reads."""
    sums: dict[str, Tensor] = {}

    def add(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].flatten(0, -2)
        sums[name] = sums.get(name, torch.zeros(())) + (rows.T @ rows).double()

    hooks = [layer.register_forward_pre_hook(partial(add, name)) for name, layer in linears.items()]
    for part in windows.split(4):
        model(input_ids=part)
    for hook in hooks:
        hook.remove()
    return {name: Moments(found[None]) for name, found in sums.items()}


@torch.no_grad()
def rounded(
    linears: Mapping[str, nn.Linear],
    floats: Mapping[str, Tensor],
    moments: Mapping[str, Moments],
    format: WeightFormat,
    rounding: str,
) -> tuple[float, float]:
    """Give every layer its weight in a format; bits of a weight, and the relative error of all together."""
    stored = count = 0
    error = size = 0.0
    for name, layer in linears.items():
        found = quantize_weight(floats[name], [format], moments[name], 1, rounding).weights[format].dequantize()
        layer.weight.copy_(found)
        stored, count = stored + format.storage_bytes(found.shape), count + found.numel()
        error += float((found - floats[name]).double().square().sum())
        size += float(floats[name].double().square().sum())
    return 8 * stored / count, math.sqrt(error / size)


def study(schemes: Sequence[str], roundings: Sequence[str], windows: int, unseen: int) -> None:
    known, float_model = (SmallLlama(Places.of(None, False)) for _ in range(2))
    linears = {n: m for n, m in known.model.named_modules() if isinstance(m, nn.Linear) and n != HEAD}
    floats = {name: layer.weight.detach().clone() for name, layer in linears.items()}
    seen = torch.cat([batch["input_ids"] for batch in known.calibration])[:windows]
    moments = moments_of(known.model, linears, seen)
    print("| scheme | rounding | bits | error of weights | KL x 1000 | perplexity ratio |\n|---|---|---|---|---|---|")
    for scheme in schemes:
        format = Scheme.parse(scheme).weight
        assert format is not None, "a format of weights"
        for rounding in roundings:
            bits, error = rounded(linears, floats, moments, format, rounding)
            found = next_tokens(float_model.model, known.model, known.inputs[:unseen], known.targets[:unseen])
            row = f"{bits:.2f} | {error:.4f} | {1000 * found.kl:.3f} | {found.ratio:.4f}"
            print(f"| {scheme} | {rounding} | {row} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=[*SCALES, *FLOATS])
    parser.add_argument("--rounding", nargs="+", default=["gptq", "nearest"])
    parser.add_argument("--windows", type=int, default=48, help="of the calibration text (at most 128)")
    parser.add_argument("--unseen", type=int, default=16, help="windows of other text (at most 60)")
    options = parser.parse_args()
    study(options.schemes, options.rounding, options.windows, options.unseen)


if __name__ == "__main__":
    main()
