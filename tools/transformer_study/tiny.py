"""Tiny configurations of transformers' architectures: which roles the tensors of their attention were given, whether
the file computes what the simulation does, and whether the quantized model generates.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from zoo.entry import run
from zoo.every import ZOO
from zoo.measure import file_error

import quantkit
from quantkit.errors import QuantkitError
from quantkit.targets.roles import ADDITION_RESULT, KEY, LAYER_INPUT, PROBABILITIES, QUERY, VALUE

COUNTED = (LAYER_INPUT, QUERY, KEY, PROBABILITIES, VALUE, ADDITION_RESULT)
ARCHITECTURES = (
    "bert distilbert deberta_v2 modernbert t5 bart gpt2 opt bloom gpt_neox llama qwen2 qwen3 mistral gemma gemma2 phi "
    "phi3 vit swin"
).split()
NEW_TOKENS = 5
SAMPLES, UNSEEN = 4, 100


@dataclass(frozen=True)
class Tiny:
    """One architecture of the zoo, asked for 8 bits everywhere."""

    architecture: str
    group: str = "tiny"

    @property
    def name(self) -> str:
        return f"tiny {self.architecture}"

    def measured(self) -> dict[str, Any]:
        """The sites in each role, the error of the file, and whether the quantized model generates."""
        entry = ZOO[f"transformers/{self.architecture}"]
        model = entry.model()
        calibration = [entry.inputs(SAMPLES, seed) for seed in range(2)]
        try:
            result = quantkit.quantize(
                model, "w8a8", calibration, rules={"*": "w8a8"}, rounding="nearest", correction=None, progress=False
            )
        except QuantkitError as error:
            return {"refused": str(error)}
        unseen = entry.inputs(SAMPLES, UNSEEN)
        return {**roles(result), **_file(result, unseen), "generates": generates(model, result.model, unseen)}


NETWORKS = tuple(Tiny(name) for name in ARCHITECTURES)


def roles(result: quantkit.Result) -> dict[str, int]:
    """How many sites there are in each role."""
    found = Counter(role for site in result.simulated().sites for role in site.roles)
    return {role: found[role] for role in COUNTED}


def _file(result: quantkit.Result, unseen: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        try:
            result.export_onnx(path)
        except QuantkitError as error:
            return {"file": f"not exported: {error}"}
        with torch.no_grad():
            return {"error": file_error(path, run(result.model, unseen), unseen)}


def generates(model: nn.Module, quantized: nn.Module, batch: Any) -> str:
    """Whether the quantized model generates as many tokens as the float one; a dash where that generates none."""
    if not getattr(model, "can_generate", lambda: False)():
        return "-"
    prompt = {name: x for name, x in batch.items() if name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    one, other = (m.generate(**prompt, **options) for m in (model, quantized))
    return "yes" if one.shape == other.shape else f"{tuple(other.shape)}, not {tuple(one.shape)}"
