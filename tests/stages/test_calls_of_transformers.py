"""Models of transformers are quantized as they are: with what tokenizers return, with labels, with caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantkit

transformers = pytest.importorskip("transformers")
SIZES: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 32, "initializer_range": 0.2}
NETWORKS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {**SIZES, "num_key_value_heads": 2},
    "GPT2LMHeadModel": {"vocab_size": 61, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32},
    "T5ForConditionalGeneration": {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1,
                                   "num_heads": 4, "decoder_start_token_id": 0},
}  # fmt: skip


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model: nn.Module = kind(kind.config_class(**NETWORKS[name])).eval()
    assert model.config.use_cache
    return model


def batch(model: nn.Module, seed: int = 0, labels: bool = False) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 61, (4, 9), generator=draw)
    found = {"input_ids": ids, "attention_mask": (torch.arange(9) < 9 - torch.arange(4)[:, None]).long()}
    if model.config.is_encoder_decoder:
        found["decoder_input_ids"] = ids[:, :6]
    return transformers.BatchEncoding(found | ({"labels": ids} if labels else {}))


@torch.no_grad()
def greedy(model: nn.Module, ids: Tensor, count: int) -> Tensor:
    """Likeliest tokens one after the other, each by a call on all before it."""
    for _ in range(count):
        ids = torch.cat([ids, model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("budget", ["w4", "w8a8"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_quantized_model_generates_with_its_cache(name: str, budget: str) -> None:
    model = built(name)
    result = quantkit.quantize(model, budget, [batch(model)], rounding="nearest", correction=None, progress=False)
    ids = batch(model, seed=1)["input_ids"][:2]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    found = result.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert found.shape == model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options).shape
    assert torch.equal(found[:, : ids.shape[1]], ids) or model.config.is_encoder_decoder


def test_what_generates_with_a_cache_is_what_generates_without() -> None:
    model = built("LlamaForCausalLM")
    result = quantkit.quantize(model, "w8a8", [batch(model)], rounding="nearest", correction=None, progress=False)
    ids = batch(model, seed=1)["input_ids"][:2]
    cached = result.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, eos_token_id=None
    )
    assert torch.equal(cached, greedy(result.model, ids, 5))


def test_labels_change_nothing_but_the_outputs() -> None:
    model = built("LlamaForCausalLM")
    options = {"rounding": "nearest", "correction": None, "progress": False}
    plain, labelled = (
        quantkit.quantize(model, "w8a8", [batch(model, labels=own)], **options) for own in (False, True)
    )
    assert plain.plan.digest() == labelled.plan.digest()
    for name, found in plain.quantized.ranges.items():
        assert found.scale == pytest.approx(labelled.quantized.ranges[name].scale, rel=1e-6), name
