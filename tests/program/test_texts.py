"""Calibration as texts: the batches that a tokenizer's tokens become, and what is no text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantkit
from quantkit.errors import InvalidRequest
from quantkit.program.texts import as_tokens

tokenizers = pytest.importorskip("tokenizers")
WORDS = "a an cat dog sat on the mat and ran away from it".split()
TEXTS = ["a cat sat", "the dog ran away from the cat and sat on the mat", "a dog", "it sat on the mat and ran " * 3]


def tokenizer() -> Any:
    """One of tokenizers: a token a word, between 1 and 2, as BERT's does."""
    vocabulary = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3} | {word: 4 + i for i, word in enumerate(WORDS)}
    found = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    found.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    found.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return found


def of_transformers(**options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer(), **options)


class Words(nn.Module):
    """The mean of word vectors that no mask hides, scored."""

    def __init__(self, positions: int = 64) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(32, 8), nn.Linear(8, 5)
        self.config = type("Config", (), {"max_position_embeddings": positions})()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        kept = attention_mask.unsqueeze(-1)
        return self.head((self.words(input_ids) * kept).sum(1) / kept.sum(1))


def tokens_of(batches: list[dict[str, Tensor]]) -> list[list[int]]:
    """What every text became, without padding, the shortest first."""
    return [
        ids[mask == 1].tolist() for b in batches for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
    ]


@pytest.mark.parametrize("kind", ["tokenizers", "transformers", "transformers, no padding token"])
def test_tokens_are_the_tokenizers(kind: str) -> None:
    own = tokenizer()
    used = own if kind == "tokenizers" else of_transformers(**{"pad_token": "[PAD]"} if kind == "transformers" else {})
    found = as_tokens(Words(), TEXTS, used)
    assert tokens_of(found) == sorted((own.encode(text).ids for text in TEXTS), key=len)
    assert set(found[0]) == {"input_ids", "attention_mask"}  # the model takes no types
    assert found[0]["input_ids"].shape == (4, 24) and found[0]["input_ids"].dtype == torch.int64


def test_texts_of_about_one_length_share_a_batch() -> None:
    found = as_tokens(Words(), [" ".join(WORDS[:n]) for n in (1, 9) for _ in range(16)], tokenizer())
    assert [tuple(batch["input_ids"].shape) for batch in found] == [(16, 8), (16, 16)]


def test_long_texts_are_cut_at_what_model_and_tokenizer_take() -> None:
    settled = tokenizer()
    settled.enable_truncation(5)
    settled.enable_padding(length=40)
    assert max(map(len, tokens_of(as_tokens(Words(), TEXTS, settled)))) == 5
    assert settled.padding["length"] == 40  # its own settings stay
    (batch,) = as_tokens(Words(positions=6), TEXTS, of_transformers(model_max_length=7))
    assert batch["input_ids"].shape == (4, 6) and batch["input_ids"][-1, -1] == 2  # still closed


def test_texts_and_their_tokens_give_one_result() -> None:
    model, used = Words().eval(), of_transformers(pad_token="[PAD]")
    by_texts = quantkit.quantize(model, "w8a8", TEXTS * 4, tokenizer=used, progress=False)
    by_tokens = quantkit.quantize(model, "w8a8", as_tokens(model, TEXTS * 4, used), progress=False)
    assert by_texts.plan.digest() == by_tokens.plan.digest()
    assert torch.equal(by_texts.quantized.weights["head"].codes, by_tokens.quantized.weights["head"].codes)
    three = quantkit.profile(model, TEXTS * 4, tokenizer=used, samples=3, schemes=["w8"], progress=False)
    assert three.layers.keys() == {"words", "head"}


class Takes(nn.Module):
    """A forward with other arguments."""

    def __init__(self, pair: bool) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)
        if pair:
            self.forward = self.pair  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)

    def pair(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        return self.head(input_ids + decoder_input_ids)


@pytest.mark.parametrize(
    ("model", "calibration", "with_tokenizer", "told"),
    [
        (Words(), TEXTS, False, "pass tokenizer=|tokenizer= takes"),
        (Words(), "a cat", False, "tokenizer= takes"),
        (Words(), (text for text in TEXTS), False, "Texts need a tokenizer"),
        (Words(), [{"input_ids": torch.ones(1, 3)}], True, "item 0 is of type dict. Leave the tokenizer out"),
        (Words(), None, True, "a list of texts, and that is NoneType"),
        (Words(), "a cat", True, "a list of texts, and that is one text"),
        (Words(), ["a cat", "  "], True, "text 1 is empty"),
        (Words(), [], True, "is empty"),
        (Takes(pair=False), TEXTS, True, "the model takes x"),
        (Takes(pair=True), TEXTS, True, "'decoder_input_ids'"),
    ],
)
def test_what_cannot_be_read_is_refused(model: nn.Module, calibration: Any, with_tokenizer: bool, told: str) -> None:
    with pytest.raises(InvalidRequest, match=told):
        quantkit.quantize(model, "w8", calibration, tokenizer=tokenizer() if with_tokenizer else None, progress=False)


def test_what_is_no_tokenizer_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="of transformers or of tokenizers, not int"):
        as_tokens(Words(), TEXTS, 3)
