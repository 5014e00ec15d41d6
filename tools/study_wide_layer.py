"""What does GPTQ gain where X^T X of a wide layer is kept whole, and what does that take?

    python tools/study_wide_layer.py [--widths 64 1024 8192] [--wheels FOLDER]

The second layer of CREPE tiny has 8,192 inputs. It is rounded to 8 and 4 bits from its inputs in the float network on
64 windows, with X^T X in blocks of so many inputs; printed are the relative error of its outputs on 32 other windows,
and seconds of the CPU.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
from packages.crepe import crepe
from study_packages import CACHE
from torch import Tensor, nn

from quantkit.formats import WeightFormat
from quantkit.ranges.statistics import accumulate
from quantkit.rounding.blocks import Blocks
from quantkit.rounding.layer_inputs import LayerInputs, layer_inputs
from quantkit.rounding.moments import Moments
from quantkit.rounding.weights import quantize_weight

WIDTHS = (64, 256, 512, 1024, 2048, 8192)
SEEN, UNSEEN = 64, 32  # windows


def windows_of(wheels: Path) -> tuple[Tensor, nn.Conv2d]:
    """What the layer reads (windows, channels, positions, 1), and the layer."""
    case = crepe(wheels)
    layer, read = case.model.get_submodule("conv2"), []
    assert isinstance(layer, nn.Conv2d)
    hook = layer.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with torch.no_grad():
        for batch in case.calibration:
            case.model(batch)
    hook.remove()
    return torch.cat(read)[: SEEN + UNSEEN], layer


def moments_of(inputs: LayerInputs, width: int) -> Moments:
    """X^T X of a layer's inputs, in blocks of so many."""
    sums: dict[str, Tensor] = {}
    blocks = Blocks(-(-inputs.width // width), width)
    accumulate(sums, "layer", inputs, blocks)
    return Moments(sums["layer"], count=blocks.count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS)
    parser.add_argument("--wheels", type=Path, default=os.environ.get("QUANTKIT_WHEELS", CACHE))
    options = parser.parse_args()
    windows, layer = windows_of(Path(options.wheels))
    weight = layer.weight.detach().flatten(1)
    seen, others = (layer_inputs("conv2d", (x, layer.weight), {}) for x in windows.split([SEEN, UNSEEN]))
    unseen = others.columns(slice(0, others.width))[0]
    wanted = unseen @ weight.T

    def error(moments: Moments | None, bits: str) -> float:
        format, how = WeightFormat(bits), "nearest" if moments is None else "gptq"
        found = quantize_weight(weight, [format], moments, rounding=how).weights[format].dequantize()
        return 100 * float((unseen @ (found - weight).T).norm() / wanted.norm())

    print("| inputs in a block | 8 bits, % | 4 bits, % | seconds, sum | seconds, factor |\n|---|---|---|---|---|")
    print(f"| nearest | {error(None, '8'):.3f} | {error(None, '4'):.2f} | 0 | 0 |")
    for width in options.widths:
        start = time.process_time()
        moments = moments_of(seen, width)
        summed = time.process_time()
        assert moments.factor is not None
        factored = time.process_time()
        seconds = f"{summed - start:.1f} | {factored - summed:.1f}"
        print(f"| {width:,} | {error(moments, '8'):.3f} | {error(moments, '4'):.2f} | {seconds} |", flush=True)


if __name__ == "__main__":
    main()
