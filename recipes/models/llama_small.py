"""A Llama of 5.2 million parameters (Touvron et al., arXiv 2302.13971), trained on two million tokens of Wikipedia.
Needs transformers; its weights are read separately.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

WINDOW, WINDOWS = 256, 128


def build() -> nn.Module:
    """The network in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=640, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512, rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=1,
        use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def preprocess(ids: np.ndarray) -> Tensor:
    """The tokens of a text, in windows (windows, tokens) that start at even distances."""
    text = torch.from_numpy(ids.astype(np.int64))
    starts = torch.linspace(0, len(text) - WINDOW, WINDOWS).long()
    return torch.stack([text[start : start + WINDOW] for start in starts])
