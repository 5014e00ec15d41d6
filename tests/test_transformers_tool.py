"""The scores of tools/study_transformers.py against their definitions, and its rows on what it keeps."""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))
pytest.importorskip("transformers")
from transformer_study.page import page, told
from transformer_study.rows import GROUPS, rows
from transformer_study.scores import mean_cosine, next_tokens, pooled, similarity_rank
from transformer_study.tiny import NETWORKS

VOCABULARY, WINDOW = 23, 12


def tiny_llama(seed: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)).eval()


def test_next_tokens_by_definition() -> None:
    one, other = tiny_llama(0), tiny_llama(1)
    text = torch.randint(0, VOCABULARY, (5, WINDOW + 1))
    found = next_tokens(one, other, text[:, :-1], text[:, 1:], batch=2)
    losses, divergences = {0: [], 1: []}, []
    with torch.no_grad():
        for window in text:
            p, q = (m(input_ids=window[None, :-1]).logits[0].double().softmax(-1).numpy() for m in (one, other))
            for i, right in enumerate(window[1:].tolist()):
                losses[0].append(-math.log(p[i, right]))
                losses[1].append(-math.log(q[i, right]))
                divergences.append(sum(a * math.log(a / b) for a, b in zip(p[i], q[i], strict=True)))
    assert found.float_perplexity == pytest.approx(math.exp(np.mean(losses[0])), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(np.mean(losses[1])), rel=1e-6)
    assert found.kl == pytest.approx(np.mean(divergences), rel=1e-5)
    assert next_tokens(one, one, text[:, :-1], text[:, 1:]).ratio == 1


def test_padding_is_not_in_a_sentence_vector() -> None:
    states, mask = torch.randn(2, 5, 4), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    found = pooled(states, mask)
    mean = states[0, :3].mean(0)
    assert torch.allclose(found[0], mean / mean.norm())
    assert mean_cosine(found, found) == pytest.approx(1)


def test_similarity_rank_goes_by_order_alone() -> None:
    angles = torch.tensor([0.9, 0.1, 0.5, 0.2])
    vectors = torch.stack([torch.tensor([[1.0, 0.0]]).repeat(4, 1), torch.stack([angles.cos(), angles.sin()], 1)], 1)
    assert similarity_rank(vectors.flatten(0, 1), [0.0, 3.1, 1.0, 2.0]) == pytest.approx(100)


def test_every_row_has_a_name_of_its_own_and_stands_in_the_page() -> None:
    every = [*rows(), *NETWORKS]
    assert len({row.name for row in every}) == len(every) and {row.group for row in every} == set(GROUPS)
    text = page(every, {row.name: {"refused": "not | yet"} for row in every}, quick=True)
    assert all(f"| {row.name} |" in text for row in every) and "not / yet" in text and "tenth" in text
    assert told(every[0], {"cosine": 0.99321}).startswith(f"{every[0].name}: cosine 0.9932")


def test_a_killed_process_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    study = import_module("study_transformers")
    ended = subprocess.CompletedProcess([], -9, stdout="", stderr="quantkit: a notice")
    monkeypatch.setattr(study.subprocess, "run", lambda *_, **__: ended)
    options = argparse.Namespace(quick=True, wheels=None)
    with pytest.raises(SystemExit, match="killed by signal 9"):
        study.in_own_process(study.every_row()[0], options)
    ended.returncode = 1
    assert study.in_own_process(study.every_row()[0], options) == {"refused": "quantkit: a notice"}
