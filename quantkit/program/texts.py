"""Calibration given as texts: what a tokenizer makes of them, in batches as the model takes them.

Texts of about one length go into a batch, padded to a multiple of ``MULTIPLE`` tokens, so that there are few sizes;
what is padding the attention mask says, and it counts nowhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import InvalidRequest
from quantkit.program.intercept import forward_parameters
from quantkit.progress import notice

BATCH, MULTIPLE = 16, 8  # texts, tokens
IDS, MASK, TYPES = "input_ids", "attention_mask", "token_type_ids"
UNLIMITED = 1 << 20  # tokens: what a tokenizer calls its maximum beyond is none
_ADVICE = "tokenizer= takes a tokenizer of transformers or of tokenizers"

Tokens = dict[str, list[int]]  # of one text, by the names of inputs


def as_tokens(model: nn.Module, calibration: Any, tokenizer: Any, samples: int | None = None) -> Any:
    """The calibration data as it is where no ``tokenizer`` is given; else its texts, up to ``samples`` of them, as
    batches of tokens. A text longer than the tokenizer's or the model's own maximum is cut.

    Raises InvalidRequest for texts without a tokenizer, a tokenizer without texts, an empty text, and a model that
    takes no tokens.
    """
    if tokenizer is None:
        if isinstance(calibration, str) or (isinstance(calibration, list | tuple) and _are_texts(calibration[:1])):
            raise InvalidRequest(f"The calibration data are texts, and the model takes numbers: {_ADVICE}.")
        return calibration
    texts = _texts(calibration)[:samples]
    if not isinstance(model, nn.Module):
        raise InvalidRequest(f"The model must be a torch.nn.Module, not {type(model).__name__}.")
    names = _inputs_of(model)
    limit = min(_limit(tokenizer), _limit_of_positions(model))
    tokens = _encoder(tokenizer, limit)(texts)
    for number, one in enumerate(tokens):
        if not one[IDS]:
            raise InvalidRequest(f"The tokenizer makes no token of calibration text {number}, {texts[number][:40]!r}.")
    if cut := sum(len(one[IDS]) >= limit for one in tokens):
        notice(f"{cut} of {len(texts)} calibration texts have {limit} tokens or more, and were cut there")
    return list(_batches(tokens, names, _padding_token(tokenizer), limit))


def _are_texts(items: Sequence[Any]) -> bool:
    return bool(items) and all(isinstance(item, str) for item in items)


def _texts(calibration: Any) -> list[str]:
    """The texts; raises InvalidRequest for what is none."""
    if calibration is None or isinstance(calibration, str) or not isinstance(calibration, Iterable):
        what = "one text" if isinstance(calibration, str) else type(calibration).__name__
        raise InvalidRequest(f"tokenizer= reads calibration=, a list of texts, and that is {what}.")
    texts = list(calibration)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise InvalidRequest(
                f"tokenizer= reads texts, and calibration item {number} is of type {type(text).__name__}. Leave the "
                "tokenizer out where batches are tokens already."
            )
        if not text.strip():
            raise InvalidRequest(f"Calibration text {number} is empty: leave it out.")
    if not texts:
        raise InvalidRequest("The calibration data is empty. Pass a few hundred typical texts.")
    return texts


def _inputs_of(model: nn.Module) -> tuple[str, ...]:
    """Those of a tokenizer's results that the model takes."""
    known = {parameter.name: parameter for parameter in forward_parameters(model)}
    if IDS not in known:
        raise InvalidRequest(
            f"Texts become {IDS!r}, and the model takes {', '.join(known) or 'nothing by name'}. Pass calibration= as "
            "batches that it takes."
        )
    if "decoder_input_ids" in known:
        raise InvalidRequest(
            "The model reads and writes, and texts alone do not say what it is to write. Pass calibration= as batches "
            "with 'input_ids', 'attention_mask' and 'decoder_input_ids'."
        )
    others = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())
    return tuple(name for name in (IDS, MASK, TYPES) if name in known or (name == MASK and others))


def _limit(tokenizer: Any) -> int:
    """The most tokens that a tokenizer is set to make of a text."""
    settings = getattr(tokenizer, "truncation", None)
    own = settings["max_length"] if isinstance(settings, dict) else getattr(tokenizer, "model_max_length", None)
    return own if isinstance(own, int) and own < UNLIMITED else UNLIMITED


def _limit_of_positions(model: nn.Module) -> int:
    """The most positions that the model's configuration tells of."""
    own = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return own if isinstance(own, int) and own > 0 else UNLIMITED


def _padding_token(tokenizer: Any) -> int:
    """What to fill up with: the tokenizer's own padding, or any token, since the mask hides it."""
    own = getattr(tokenizer, "pad_token_id", None)
    return own if isinstance(own, int) else 0


def _encoder(tokenizer: Any, limit: int) -> Callable[[list[str]], list[Tokens]]:
    """What makes tokens of texts, at most so many of each, without padding; the tokenizer's own settings stay."""
    if hasattr(tokenizer, "encode_batch") and hasattr(tokenizer, "to_str"):
        own = type(tokenizer).from_str(tokenizer.to_str())
        own.no_padding()
        own.enable_truncation(limit)
        return lambda texts: [
            {IDS: one.ids, MASK: one.attention_mask, TYPES: one.type_ids} for one in own.encode_batch(texts)
        ]
    if not callable(tokenizer):
        raise InvalidRequest(f"{_ADVICE}, not {type(tokenizer).__name__}.")

    def encode(texts: list[str]) -> list[Tokens]:
        found = tokenizer(texts, truncation=True, max_length=limit, padding=False)
        return [{name: found[name][i] for name in found} for i in range(len(texts))]

    return encode


def _batches(tokens: Sequence[Tokens], names: Sequence[str], filler: int, limit: int) -> Iterator[dict[str, Tensor]]:
    """Batches of texts of about one length, each padded on the right."""
    ordered = sorted(tokens, key=lambda one: len(one[IDS]))
    for start in range(0, len(ordered), BATCH):
        some = ordered[start : start + BATCH]
        longest = len(some[-1][IDS])
        length = max(longest, min(-(-longest // MULTIPLE) * MULTIPLE, limit))
        fill = {IDS: filler}
        yield {
            name: torch.tensor([_of(one, name) + [fill.get(name, 0)] * (length - len(one[IDS])) for one in some])
            for name in names
        }


def _of(tokens: Tokens, name: str) -> list[int]:
    """What a tokenizer says of a text under a name; of a mask or types that it does not say, what they mean."""
    return list(tokens.get(name, [int(name == MASK)] * len(tokens[IDS])))
