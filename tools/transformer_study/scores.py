"""How much of a transformer is left: perplexity and KL divergence of next tokens, cosines of sentence vectors, and
Spearman's correlation with the judgement of people.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

CHUNK = 1024  # tokens whose distributions are held in float64 at a time

Model = Callable[..., Any]


@dataclass(frozen=True)
class NextTokens:
    """How a quantized language model predicts text beside the float one: both perplexities, and the mean KL divergence
    from the float distribution over the whole vocabulary, per token.
    """

    float_perplexity: float
    perplexity: float
    kl: float

    @property
    def ratio(self) -> float:
        return self.perplexity / self.float_perplexity


@torch.no_grad()
def next_tokens(model: Model, quantized: Model, inputs: Tensor, targets: Tensor, batch: int = 4) -> NextTokens:
    """Both models on windows of tokens (windows, tokens), ``targets`` being the tokens that follow each.

    The logits of ``batch`` windows are held at a time, and of ``CHUNK`` tokens in float64.
    """
    sums = torch.zeros(3, dtype=torch.float64)  # negative log-likelihoods, divergence
    for ids, following in zip(inputs.split(batch), targets.split(batch), strict=True):
        logits = [_logits(one(input_ids=ids)).flatten(0, 1) for one in (model, quantized)]
        for p, q, right in zip(*(x.split(CHUNK) for x in (*logits, following.flatten())), strict=True):
            p, q = (x.double().log_softmax(-1) for x in (p, q))
            likelihoods = [-x.gather(-1, right[:, None]).sum() for x in (p, q)]
            sums += torch.stack([*likelihoods, (p.exp() * (p - q)).sum()])
    first, second, divergence = (sums / targets.numel()).tolist()
    return NextTokens(math.exp(first), math.exp(second), divergence)


def _logits(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    """The mean of each sentence's tokens (sentences, tokens, width), of length 1."""
    return torch.nn.functional.normalize((states * mask[..., None]).sum(1), dim=-1)


@torch.no_grad()
def sentence_vectors(model: Model, batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """A vector of length 1 for every sentence, in order."""
    vectors = [pooled(_logits(model(**batch)), batch["attention_mask"]) for batch in batches]
    return torch.cat(vectors)


def mean_cosine(found: Tensor, wanted: Tensor) -> float:
    """The mean cosine between vectors of length 1."""
    return float((found.double() * wanted.double()).sum(-1).mean())


def similarity_rank(vectors: Tensor, scores: Sequence[float]) -> float:
    """100 x Spearman's correlation of people's ``scores`` of pairs of sentences with their cosines; of a pair, the
    vectors stand one after the other.
    """
    cosines = (vectors[0::2].double() * vectors[1::2].double()).sum(-1)
    return 100 * float(spearmanr(cosines.numpy(), scores).statistic)
