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
from torch import Tensor

from quantkit.formats import WeightFormat
from quantkit.rounding.moments import Moments
from quantkit.rounding.weights import quantize_weight

CACHE = Path(__file__).resolve().parent.parent / "out" / "wheels"
WIDTHS = (64, 256, 512, 1024, 2048, 8192)
SEEN, UNSEEN = 64, 32  # windows


def rows_of(wheels: Path) -> tuple[Tensor, Tensor]:
    """The layer's inputs (windows, positions, inputs), and its weight as a matrix."""
    case = crepe(wheels)
    layer, read = case.model.get_submodule("conv2"), []
    hook = layer.register_forward_pre_hook(lambda _, args: read.append(args[0][..., 0]))
    with torch.no_grad():
        for batch in case.calibration:
            case.model(batch)
    hook.remove()
    weight = layer.weight.detach().flatten(1)
    kernel = layer.weight.shape[2]
    windows = torch.cat(read)[: SEEN + UNSEEN].unfold(2, kernel, 1)
    return windows.permute(0, 2, 1, 3).flatten(2), weight


def blocks_of(rows: Tensor, width: int) -> Moments:
    """X^T X of rows (N, K), in blocks of so many inputs."""
    parts = rows.split(width, dim=1)
    return Moments(torch.stack([x.T @ x for x in parts]).double(), count=len(parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS)
    parser.add_argument("--wheels", type=Path, default=os.environ.get("QUANTKIT_WHEELS", CACHE))
    options = parser.parse_args()
    windows, weight = rows_of(Path(options.wheels))
    seen, unseen = windows[:SEEN].flatten(0, 1), windows[SEEN:].flatten(0, 1)
    wanted = unseen @ weight.T

    def error(moments: Moments | None, bits: str) -> float:
        format, how = WeightFormat(bits), "nearest" if moments is None else "gptq"
        found = quantize_weight(weight, [format], moments, rounding=how).weights[format].dequantize()
        return 100 * float((unseen @ (found - weight).T).norm() / wanted.norm())

    print("| inputs in a block | 8 bits, % | 4 bits, % | seconds, sum | seconds, factor |\n|---|---|---|---|---|")
    print(f"| nearest | {error(None, '8'):.3f} | {error(None, '4'):.2f} | 0 | 0 |")
    for width in options.widths:
        start = time.process_time()
        moments = blocks_of(seen, width)
        summed = time.process_time()
        assert moments.factor is not None
        factored = time.process_time()
        seconds = f"{summed - start:.1f} | {factored - summed:.1f}"
        print(f"| {width:,} | {error(moments, '8'):.3f} | {error(moments, '4'):.2f} | {seconds} |", flush=True)


if __name__ == "__main__":
    main()
