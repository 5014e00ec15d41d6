"""How long does GPTQ take beside a plain reference of it, and how much of the language model is left?

    python tools/study_gptq.py [--bits 4 3 2] [--group 64] [--windows 128] [--unseen 60]

Every linear layer of `llama-wiki-5m` with zero points, on windows of 256 tokens of the calibration text that start at
drawn places. Both get the same windows on one thread, one after the other. KL divergence from the float model on
windows of text that decided nothing, and the processor time of the whole call, `quantkit.apply` with nothing learned
after rounding, over that of `tests/rounding/plain_gptq.py`.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import quantkit

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.append(str(REPOSITORY))  # the reference stands beside the tests that need it
from tests.rounding.plain_gptq import plain_gptq  # noqa: E402

WINDOW = 256
BATCH = 16


def windows(ids: np.ndarray, starts: Tensor) -> Tensor:
    """Windows of token ids (windows, tokens)."""
    return torch.stack([torch.from_numpy(ids[i : i + WINDOW].astype(np.int64)) for i in starts.tolist()])


def calibration_windows(data: Path, count: int, seed: int) -> Tensor:
    """Windows of the calibration text that start anywhere."""
    ids = np.load(data / "wt2_calib.npz")["ids"]
    return windows(ids, torch.randint(len(ids) - WINDOW, (count,), generator=torch.Generator().manual_seed(seed)))


def unseen_windows(data: Path, count: int) -> Tensor:
    """The first windows of the held-out text, one after the other."""
    return windows(np.load(data / "wt2_test_a.npz")["ids"], torch.arange(count) * WINDOW)


def language_model(data: Path) -> nn.Module:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(data / "llama-wiki-5m", local_files_only=True)
    model.config.use_cache = False
    return model.eval()


@torch.no_grad()
def kl(model: nn.Module, quantized: nn.Module, ids: Tensor) -> float:
    """Mean KL divergence of next tokens from the float model's."""
    rows = []
    for part in ids.split(BATCH):
        p, q = (m(input_ids=part).logits.double().log_softmax(-1) for m in (model, quantized))
        rows.append((p.exp() * (p - q)).sum(-1).flatten())
    return float(torch.cat(rows).mean())


def timed(work: Callable[[], nn.Module]) -> tuple[nn.Module, float]:
    """What ``work`` returns and the processor time it takes, in seconds."""
    start = time.process_time()
    return work(), time.process_time() - start


def by_reference(model: nn.Module, ids: Tensor, bits: int, group: int) -> nn.Module:
    found = copy.deepcopy(model)
    plain_gptq(found, ids.split(BATCH), bits, group)
    return found


def by_quantkit(model: nn.Module, ids: Tensor, bits: int, group: int) -> nn.Module:
    target = replace(quantkit.Target.load("onnxruntime-cpu"), weight_groups=True, weight_zero_points=True)
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    result = quantkit.apply(
        model,
        dict.fromkeys(layers, f"w{bits}g{group}z"),
        calibration=[{"input_ids": part} for part in ids.split(BATCH)],
        target=target,
        reconstruction="none",
        correction=None,
        progress=False,
    )
    return result.model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2])
    parser.add_argument("--group", type=int, default=64, help="weights that share a scale (default 64)")
    parser.add_argument("--windows", type=int, default=128, help="of the calibration text (default 128)")
    parser.add_argument("--unseen", type=int, default=60, help="windows of the held-out text (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the places where windows start")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = Path(os.environ.get("QUANTKIT_DATA", REPOSITORY.parent / "shared" / "data"))
    model, unseen = language_model(data), unseen_windows(data, options.unseen)
    ids = calibration_windows(data, options.windows, options.seed)
    print("bits   KL plain  KL quantkit   seconds plain  quantkit   ratio")
    for bits in options.bits:
        plain, plain_seconds = timed(lambda bits=bits: by_reference(model, ids, bits, options.group))
        own, own_seconds = timed(lambda bits=bits: by_quantkit(model, ids, bits, options.group))
        print(
            f"{bits:4d} {kl(model, plain, unseen):10.5f} {kl(model, own, unseen):12.5f} {plain_seconds:15.1f} "
            f"{own_seconds:9.1f} {own_seconds / plain_seconds:7.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
