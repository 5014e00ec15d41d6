"""The tensors of a model's result: their names, which of them count, and which one is the model's answer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten

from quantkit.errors import InvalidRequest

_CARRIED = "loss|past_key_values|cache|mems|hidden_states|attentions|router_logits"
_ALWAYS_CARRIED = re.compile(rf"(?:^|[._])(?:{_CARRIED})(?:$|[.\[])")
_CARRIED_BESIDE_LOGITS = re.compile(r"(?:^|[._])(?:hidden_state|pooler_output)$")


def main_output(result: Any) -> Tensor:
    """The tensor that is the model's answer: ``logits`` of a dict or record, else the first that counts."""
    tensors = counted(result)
    return tensors[position_of_answer([name for name, _ in tensors])][1]


def counted(result: Any) -> list[tuple[str, Tensor]]:
    """The outputs that count, with their names: of those with numbers in them. Raises InvalidRequest where there are
    none.
    """
    every = [(name, tensor) for name, tensor in named_tensors(result) if tensor.is_floating_point()]
    if not every:
        raise InvalidRequest(_without_floats(result))
    every = [(name, tensor) for name, tensor in every if tensor.numel()] or every
    own = [(name, tensor) for name, tensor in every if not _ALWAYS_CARRIED.search(name)]
    if any(is_logits(name) for name, _ in own):
        own = [(name, tensor) for name, tensor in own if not _CARRIED_BESIDE_LOGITS.search(name)]
    return own or every


def _without_floats(result: Any) -> str:
    found = [f"{name} is {tensor.dtype}" for name, tensor in named_tensors(result)]
    if not found:
        return (
            f"The model returns {type(result).__name__}, in which no tensor is found. Let it return a tensor, a "
            "tuple, a dict or a dataclass of them."
        )
    return (
        f"The model returns no floating-point tensor ({', '.join(found[:3])}), so there is nothing to measure damage "
        "on. Let it return the scores that the argmax or the threshold reads, alone or beside the integers, as in "
        "`return scores, scores.argmax(1)`."
    )


def named_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in a result: "output" for one alone, keys and fields of records, "output[1]" for tuples."""
    if isinstance(value, Tensor):
        yield name or "output", value
    elif isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        for i, part in enumerate(value):
            yield from named_tensors(part, f"{name or 'output'}[{i}]")
    else:
        for key, part in _fields(value):
            yield from named_tensors(part, f"{name}.{key}" if name else key)


def results_of(value: Any) -> list[Tensor]:
    """All tensors of what a model returned."""
    return [tensor for _, tensor in named_tensors(value)]


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((str(key), part) for key, part in value.items())
    elif isinstance(value, tuple):
        yield from zip(value._fields, value, strict=True)  # type: ignore[attr-defined]
    elif is_dataclass(value) and not isinstance(value, type):
        yield from ((field.name, getattr(value, field.name)) for field in fields(value))
    elif isinstance(getattr(value, "logits", None), Tensor):
        yield "logits", value.logits
    else:
        leaves = tree_flatten(value)[0]
        yield from ((str(i), leaf) for i, leaf in enumerate(leaves) if leaf is not value)


def is_logits(name: str) -> bool:
    return "logits" in re.split(r"[._\[\]]", name)


def position_of_answer(names: Sequence[str]) -> int:
    return names.index("logits") if "logits" in names else 0
