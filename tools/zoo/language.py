"""Language models of transformers, from tiny configurations."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .entry import Inputs, add, randint
from .native import torchvision

VOCABULARY = 97
LENGTH = 10
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DECODER: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "use_cache": False}


def transformer(name: str, kind: str, inputs: Inputs, **config: Any) -> None:
    """Register a model of the class ``kind``, by its configuration."""

    def build() -> nn.Module:
        torchvision()
        import transformers

        made = getattr(transformers, kind)
        model: nn.Module = made(made.config_class(**config))
        return model

    add("transformers", f"transformers/{name}", build, inputs)


def text(samples: int, seed: int) -> dict[str, Any]:
    """Token numbers, none of them a special one."""
    return {"input_ids": randint(VOCABULARY - 3, samples, LENGTH, seed=seed) + 3}


def padded(samples: int, seed: int) -> dict[str, Any]:
    """Token numbers with padding at the end of every sample but the first."""
    kept = torch.arange(LENGTH) < LENGTH - torch.arange(samples)[:, None] % 4
    return {"input_ids": text(samples, seed)["input_ids"] * kept, "attention_mask": kept.long()}


def pairs(samples: int, seed: int) -> dict[str, Any]:
    """What encoder and decoder read."""
    target = randint(VOCABULARY - 3, samples, LENGTH - 3, seed=seed + 1) + 3
    return {**padded(samples, seed), "decoder_input_ids": target}


CLASSIFIER: dict[str, Any] = {**SIZES, "num_labels": 4}
transformer("bert", "BertForSequenceClassification", padded, **CLASSIFIER)
transformer("bert_masked", "BertForMaskedLM", padded, **SIZES)
transformer("roberta", "RobertaForSequenceClassification", padded, **CLASSIFIER)
transformer("albert", "AlbertForSequenceClassification", padded, embedding_size=16, **CLASSIFIER)
transformer("electra", "ElectraForTokenClassification", padded, embedding_size=16, **CLASSIFIER)
transformer("deberta_v2", "DebertaV2ForSequenceClassification", padded, relative_attention=True, position_buckets=8,
            pos_att_type=["p2c", "c2p"], **CLASSIFIER)  # fmt: skip
transformer("mobilebert", "MobileBertForSequenceClassification", padded, **CLASSIFIER | {
    "embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16})  # fmt: skip
transformer("distilbert", "DistilBertForSequenceClassification", padded, vocab_size=VOCABULARY, dim=32, n_layers=2,
            n_heads=4, hidden_dim=64, max_position_embeddings=64, num_labels=4)  # fmt: skip
transformer("mpnet", "MPNetForSequenceClassification", padded, **CLASSIFIER)
transformer("convbert", "ConvBertForSequenceClassification", padded, embedding_size=32, **CLASSIFIER)
transformer("fnet", "FNetForSequenceClassification", text, **CLASSIFIER)
transformer("squeezebert", "SqueezeBertForSequenceClassification", padded, embedding_size=32, **CLASSIFIER)
transformer("roformer", "RoFormerForSequenceClassification", padded, embedding_size=32, **CLASSIFIER)
transformer("modernbert", "ModernBertForSequenceClassification", padded, cls_token_id=1, sep_token_id=2, **CLASSIFIER)
transformer("xlnet", "XLNetForSequenceClassification", padded, vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=4,
            d_inner=64, num_labels=4)  # fmt: skip

_N: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
                      "initializer_range": 0.1, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
transformer("gpt2", "GPT2LMHeadModel", padded, **_N)
transformer("gptj", "GPTJForCausalLM", text, rotary_dim=4, **_N)
transformer("gpt_neo", "GPTNeoForCausalLM", text, **DECODER | {"num_layers": 2, "num_heads": 4, "attention_types": [
    [["global", "local"], 1]], "window_size": 4})  # fmt: skip
transformer("opt", "OPTForCausalLM", padded, ffn_dim=64, word_embed_proj_dim=32, **DECODER)
transformer("gpt_neox", "GPTNeoXForCausalLM", text, **SIZES | {"use_cache": False})
transformer("bloom", "BloomForCausalLM", padded, vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4,
            use_cache=False, initializer_range=0.1)  # fmt: skip
transformer("falcon", "FalconForCausalLM", text, **SIZES | {"use_cache": False})
transformer("mpt", "MptForCausalLM", text, vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, max_seq_len=64,
            use_cache=False)  # fmt: skip
for _name, _kind in {
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM", "gemma": "GemmaForCausalLM", "phi3": "Phi3ForCausalLM", "phi": "PhiForCausalLM",
    "olmo2": "Olmo2ForCausalLM", "stablelm": "StableLmForCausalLM", "starcoder2": "Starcoder2ForCausalLM",
    "granite": "GraniteForCausalLM", "smollm3": "SmolLM3ForCausalLM", "cohere": "CohereForCausalLM",
    "helium": "HeliumForCausalLM", "nemotron": "NemotronForCausalLM",
}.items():  # fmt: skip
    transformer(_name, _kind, padded, **DECODER)
_WINDOW: dict[str, Any] = {"sliding_window": 4, "query_pre_attn_scalar": 8}
transformer("gemma2", "Gemma2ForCausalLM", text, **_WINDOW, **DECODER)
transformer("gemma3", "Gemma3ForCausalLM", text, **_WINDOW, **DECODER)
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
transformer("mixtral", "MixtralForCausalLM", text, num_local_experts=4, **_EXPERTS, **DECODER)
transformer("qwen3_moe", "Qwen3MoeForCausalLM", text, num_experts=4, **_EXPERTS, **DECODER)
_STATE: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8,
                          "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
transformer("mamba", "MambaForCausalLM", text, **_STATE)
transformer("mamba2", "Mamba2ForCausalLM", text, num_heads=4, head_dim=16, n_groups=1, chunk_size=4, **_STATE)
transformer("recurrent_gemma", "RecurrentGemmaForCausalLM", text, **DECODER | {
    "block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 4})  # fmt: skip

_T5: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2,
                       "num_heads": 4, "relative_attention_num_buckets": 8, "use_cache": False,
                       "decoder_start_token_id": 0}  # fmt: skip
_SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
    "init_std": 0.1,
}  # fmt: skip
transformer("t5", "T5ForConditionalGeneration", pairs, **_T5)
transformer("mt5", "MT5ForConditionalGeneration", pairs, **_T5)
transformer("t5_encoder", "T5EncoderModel", padded, **_T5)
transformer("bart", "BartForConditionalGeneration", pairs, **_SEQ2SEQ)
transformer("marian", "MarianMTModel", pairs, **_SEQ2SEQ)
transformer("pegasus", "PegasusForConditionalGeneration", pairs, **_SEQ2SEQ)
