"""The operands of every attention of transformers' networks are told apart, whichever implementation computes it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from quantkit.program.record import record
from quantkit.program.roles import attention_roles
from quantkit.targets.roles import KEY, PROBABILITIES, QUERY, VALUE

transformers = pytest.importorskip("transformers")
SIZES: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 32}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
WINDOWS = {"sliding_window": 4, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]}
T5 = {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BART = {"vocab_size": 61, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
        "max_position_embeddings": 32}  # fmt: skip
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
VIT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
       "patch_size": 8}  # fmt: skip
# class -> configuration, how many attentions it has
NETWORKS: dict[str, tuple[dict[str, Any], int]] = {
    "BertModel": (SIZES, 2),
    "DistilBertModel": ({"vocab_size": 61, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}, 2),
    "ModernBertModel": ({**SIZES, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}, 2),
    "GPT2LMHeadModel": ({"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}, 2),
    "OPTForCausalLM": ({**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}, 2),
    "BloomForCausalLM": ({"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4}, 2),
    "GPTNeoXForCausalLM": (SIZES, 2),
    "FalconForCausalLM": ({**SIZES, "multi_query": True}, 2),
    "LlamaForCausalLM": (GROUPED, 2),
    "Qwen2ForCausalLM": (GROUPED, 2),
    "Qwen3ForCausalLM": (GROUPED, 2),
    "MistralForCausalLM": ({**GROUPED, "sliding_window": 4}, 2),
    "GemmaForCausalLM": ({**GROUPED, "num_key_value_heads": 1}, 2),
    "Gemma2ForCausalLM": ({**GROUPED, **WINDOWS}, 2),
    "PhiForCausalLM": (SIZES, 2),
    "Phi3ForCausalLM": ({**GROUPED, "pad_token_id": 0}, 2),
    "T5Model": (T5, 6),
    "BartModel": (BART, 6),
    "ViTModel": (VIT, 2),
    "SwinModel": (SWIN, 4),
}


def inputs_of(model: nn.Module) -> dict[str, torch.Tensor]:
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    ids = torch.randint(3, 61, (2, 9))
    padded = {"input_ids": ids, "attention_mask": (torch.arange(9) < torch.tensor([[9], [6]])).long()}
    return padded | ({"decoder_input_ids": ids[:, :7]} if model.config.is_encoder_decoder else {})


WITHOUT_SDPA = ("BloomForCausalLM", "Gemma2ForCausalLM")  # transformers refuses it
CASES = [(name, how) for name in NETWORKS for how in ("eager", "sdpa") if how == "eager" or name not in WITHOUT_SDPA]


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_every_attention_has_its_roles(name: str, implementation: str) -> None:
    kind, (options, attentions) = getattr(transformers, name), NETWORKS[name]
    model = kind(kind.config_class(**options, attn_implementation=implementation)).eval()
    assert model.config._attn_implementation == implementation
    batch = ((), inputs_of(model))
    program = record(model, batch)
    found = attention_roles(program)
    assert Counter(found.values()) == dict.fromkeys((QUERY, KEY, PROBABILITIES, VALUE), attentions)

    steps = {step.key: step for step in program.steps}
    numbers = [steps[product].inputs[position] for product, position in found]
    with torch.no_grad():
        values = program.replay(program.entering(model, batch), program.state_of(model), numbers)
    for role, x in zip(found.values(), values, strict=True):
        sums_to_one = torch.allclose(x.sum(-1), torch.ones(()), atol=1e-4)
        assert sums_to_one == (role == PROBABILITIES)
