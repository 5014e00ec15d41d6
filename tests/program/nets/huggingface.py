"""Models of transformers from tiny random configurations; building one skips the test where transformers is absent.

Weights are drawn wider than for training, so that masks, positions and neighbours are seen in the outputs.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

from tests.program.nets.entry import BatchBuilder, architecture, padding_mask, randint, randn

VOCABULARY = 31
LENGTHS = (7, 11, 4)
DECODER: dict[str, Any] = {"lengths": LENGTHS, "blocks": 2}


def transformers() -> Any:
    """The library, of the extra "hf"."""
    return pytest.importorskip("transformers", reason="transformers is absent: pip install quantkit[hf]")


def text(padding: str = "none") -> BatchBuilder:
    """Token numbers by name, with an attention mask if there is padding on the "left" or the "right"."""

    def batch(samples: int, length: int | None = None, seed: int = 0) -> tuple[tuple, dict[str, Any]]:
        length = length or LENGTHS[0]
        inputs = {"input_ids": randint(VOCABULARY, samples, length, seed=seed)}
        if padding != "none":
            mask = padding_mask(samples, length).long()
            inputs["attention_mask"] = mask.flip(1) if padding == "left" else mask
        return (), inputs

    return batch


def pixels(default: int, **options: Any) -> BatchBuilder:
    """Images by name, and ``options`` as they are."""

    def batch(samples: int, length: int | None = None, seed: int = 0) -> tuple[tuple, dict[str, Any]]:
        size = length or default
        return (), {"pixel_values": randn(samples, 3, size, size, seed=seed), **options}

    return batch


def sizes(**more: Any) -> dict[str, Any]:
    """What most configurations share."""
    common = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    return {"vocab_size": VOCABULARY, "initializer_range": 0.3, **common, **more}


def decoder(**more: Any) -> dict[str, Any]:
    """What decoders share besides: two heads of keys for four of queries, no cache."""
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return sizes(num_key_value_heads=2, max_position_embeddings=32, use_cache=False, **tokens, **more)


@architecture(text("right"), lengths=LENGTHS, blocks=2)
def bert() -> nn.Module:
    hf = transformers()
    return hf.BertForSequenceClassification(hf.BertConfig(**sizes(), max_position_embeddings=32, num_labels=3))


def build_gpt2(attention: str) -> nn.Module:
    hf = transformers()
    config = hf.GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3,
        bos_token_id=1, eos_token_id=2, use_cache=False, attn_implementation=attention,
    )  # fmt: skip
    return hf.GPT2LMHeadModel(config)


@architecture(text(), **DECODER)
def gpt2() -> nn.Module:
    return build_gpt2("sdpa")


@architecture(text("left"), **DECODER)
def gpt2_eager_padded() -> nn.Module:
    return build_gpt2("eager")


def build_llama(attention: str) -> nn.Module:
    hf = transformers()
    return hf.LlamaForCausalLM(hf.LlamaConfig(**decoder(attn_implementation=attention)))


@architecture(text(), **DECODER)
def llama() -> nn.Module:
    return build_llama("sdpa")


@architecture(text("left"), **DECODER)
def llama_padded() -> nn.Module:
    return build_llama("sdpa")


@architecture(text(), **DECODER)
def llama_eager() -> nn.Module:
    return build_llama("eager")


@architecture(text("left"), **DECODER)
def llama_eager_padded() -> nn.Module:
    return build_llama("eager")


@architecture(text(), **DECODER)
def qwen3() -> nn.Module:
    hf = transformers()
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**decoder(head_dim=8, tie_word_embeddings=True)))


@architecture(text(), **DECODER)
def gemma2() -> nn.Module:
    """One block looks through a window of three tokens, the other at all; scores and logits are capped."""
    hf = transformers()
    config = decoder(head_dim=8, sliding_window=3, query_pre_attn_scalar=8, attn_implementation="eager")
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**config))


def build_mixtral(experts: str) -> nn.Module:
    hf = transformers()
    config = decoder(num_local_experts=3, num_experts_per_tok=2, experts_implementation=experts)
    return hf.MixtralForCausalLM(hf.MixtralConfig(**config))


@architecture(text(), **DECODER, control_flow=("values",))
def mixtral_eager() -> nn.Module:
    """A loop over the experts that any token has chosen."""
    return build_mixtral("eager")


@architecture(text(), **DECODER)
def mixtral_batched() -> nn.Module:
    return build_mixtral("batched_mm")


@architecture(text(), **DECODER)
def mixtral_grouped() -> nn.Module:
    return build_mixtral("grouped_mm")


def translation(samples: int, length: int | None = None, seed: int = 0) -> tuple[tuple, dict[str, Any]]:
    _, inputs = text("right")(samples, length, seed)
    target = randint(VOCABULARY, samples, inputs["input_ids"].shape[1] - 1, seed=seed + 1)
    return (), inputs | {"decoder_input_ids": target}


def build_t5(activation: str) -> nn.Module:
    hf = transformers()
    config = hf.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, initializer_factor=1.0,
        relative_attention_num_buckets=8, feed_forward_proj=activation, use_cache=False, decoder_start_token_id=0,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config)


@architecture(translation, lengths=LENGTHS, blocks=4)
def t5() -> nn.Module:
    return build_t5("relu")


@architecture(translation, lengths=LENGTHS, blocks=4)
def t5_gated() -> nn.Module:
    return build_t5("gated-gelu")


VIT_TABLES = ("vit.embeddings.cls_token", "vit.embeddings.position_embeddings")


@architecture(pixels(16), blocks=2, added_tables=VIT_TABLES)
def vit() -> nn.Module:
    hf = transformers()
    common = {name: value for name, value in sizes().items() if name != "vocab_size"}
    return hf.ViTForImageClassification(hf.ViTConfig(**common, image_size=16, patch_size=4, num_labels=3))


@architecture(pixels(24, interpolate_pos_encoding=True), lengths=(24, 32, 12), blocks=2, added_tables=VIT_TABLES)
def vit_interpolated() -> nn.Module:
    """Positions resampled to the image; the size of the configuration itself, 16, would skip that."""
    hf = transformers()
    common = {name: value for name, value in sizes().items() if name != "vocab_size"}
    return hf.ViTForImageClassification(hf.ViTConfig(**common, image_size=16, patch_size=4, num_labels=3))


SWIN_TABLES = tuple(
    f"swin.encoder.layers.{stage}.blocks.{block}.attention.relative_position_bias.relative_position_bias_table"
    for stage in range(2)
    for block in range(2)
)


@architecture(pixels(16), lengths=(16, 24), blocks=4, added_tables=SWIN_TABLES)
def swin() -> nn.Module:
    hf = transformers()
    config = hf.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=(2, 2), num_heads=(2, 4), window_size=2,
        initializer_range=0.3, num_labels=3,
    )  # fmt: skip
    return hf.SwinForImageClassification(config)


def spectrogram(samples: int, length: int | None = None, seed: int = 0) -> tuple[tuple, dict[str, Any]]:
    features: Tensor = randn(samples, 8, 24, seed=seed)
    return (), {"input_features": features}


@architecture(spectrogram, blocks=2)
def whisper_encoder() -> nn.Module:
    hf = transformers()
    config = hf.WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=8, d_model=16, encoder_layers=2, encoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=24, max_source_positions=12,
        init_std=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return hf.WhisperModel(config).encoder
