"""What preparing a bf16 language model adds to the memory that the model takes.

    python tools/study_preparing.py [--layers 24] [--hidden 1024]

In a process of its own: a tiny model is prepared first, so that libraries are loaded; then a Llama of about 400
million random parameters is built in bf16, and prepared as ``quantize`` prepares it before anything is measured.
Prints the peak of the resident memory above what was resident before, over the model's bytes. Linux only (``/proc``).
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
from pathlib import Path

import torch
from torch import nn

from quantkit.session import Session
from quantkit.stages.inputs import Inputs
from quantkit.stages.options import ProfileOptions
from quantkit.stages.request import request_of
from quantkit.targets import Target
from quantkit.targets.rules import parse_schemes

VOCABULARY = 32000
LENGTH = 16  # tokens of a sample
SAMPLES = 4


def random_llama(hidden: int, layers: int) -> nn.Module:
    """A Llama with random weights, in bf16 from the start."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = hidden // 64
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        vocab_size=VOCABULARY,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


def prepare(model: nn.Module) -> int:
    """Everything that ``quantize`` does before it measures; returns the number of layers that may be quantized."""
    tokens = torch.randint(0, VOCABULARY, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    target = Target.load("onnxruntime-cpu")
    session = Session.open(model, Inputs.of(model, [{"input_ids": tokens}], None, None), target)
    request = request_of(session, parse_schemes(None, target), ProfileOptions())
    request.unmeasured()
    return len(request.ready.quantizable)


def resident(field: str) -> int:
    """Bytes of a field of this process's status: ``VmRSS`` now, ``VmHWM`` at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def measure(hidden: int, layers: int) -> None:
    prepare(random_llama(64, 1))
    model = random_llama(hidden, layers)
    stored = sum(p.numel() * p.element_size() for p in model.parameters())
    gc.collect()

    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident("VmRSS")
    quantizable = prepare(model)
    added = resident("VmHWM") - before

    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:,.0f} M parameters, {stored / 1e6:,.0f} MB, {quantizable} layers to quantize")
    print(f"preparing adds {added / 1e6:,.0f} MB: {added / stored:.3f} x the model's bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    asked = parser.parse_args()
    process = multiprocessing.get_context("spawn").Process(target=measure, args=(asked.hidden, asked.layers))
    process.start()
    process.join()
    raise SystemExit(process.exitcode)


if __name__ == "__main__":
    main()
