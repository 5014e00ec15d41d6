"""Composite functions taken apart compute what torch computes, with every combination of their options."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from quantkit.program.composites import decomposed_attention, einsum_steps, parts_of
from quantkit.program.intercept import OpKey, intercept

SAMPLES, HEADS, WIDTH, QUERIES, KEYS = 2, 2, 8, 3, 4
TOLERANCE = {"rtol": 0, "atol": 1e-12}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def operations_of(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, list[str]]:
    """What a model gives while it is watched, and the operations that were seen."""
    seen: list[str] = []

    def note(key: OpKey, func: Any, args: Any, kwargs: Any) -> Any:
        seen.append(key.op)
        return func(*args, **kwargs)

    with intercept(model, note), torch.no_grad():
        return model(*args, **kwargs), seen


MASKS = {
    "none": None,
    "boolean": torch.tensor([[False, True, False, True], [False] * 4, [True, False, False, False]]),
    "float": randn(QUERIES, KEYS, seed=9),
}
PADDINGS = {
    "none": None,
    "boolean": torch.tensor([[False, False, True, False], [False, False, False, True]]),
    "float": randn(SAMPLES, KEYS, seed=8),
}
OF_HEADS = [
    dict(zip(("kdim", "bias", "add_bias_kv", "add_zero_attn"), chosen, strict=True))
    for chosen in itertools.product((None, 5), *[(False, True)] * 3)
]


def _mask(kind: str, per_head: bool, batched: bool) -> Tensor | None:
    """(queries, keys), or one for every head of every sample."""
    mask = MASKS[kind]
    heads = HEADS * (SAMPLES if batched else 1)
    return mask if mask is None or not per_head else mask.repeat(heads, 1, 1)


@pytest.mark.parametrize("options", OF_HEADS, ids=lambda options: "-".join(str(x) for x in options.values()))
def test_multi_head_attention_is_torchs(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(WIDTH, HEADS, vdim=options["kdim"], dropout=0.1, **options).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    inside = options["kdim"] or WIDTH
    query, key, value = randn(QUERIES, SAMPLES, WIDTH), randn(KEYS, SAMPLES, inside, seed=1), None
    value = randn(KEYS, SAMPLES, inside, seed=2)

    for mask, padding, per_head, batched in itertools.product(MASKS, PADDINGS, (False, True), (False, True)):
        inputs = (query, key, value) if batched else (query[:, 0], key[:, 0], value[:, 0])
        kept = PADDINGS[padding] if batched or PADDINGS[padding] is None else PADDINGS[padding][0]
        given_masks = {"attn_mask": _mask(mask, per_head, batched), "key_padding_mask": kept}
        for need, average in ((False, True), (True, True), (True, False)):
            asked = given_masks | {"need_weights": need, "average_attn_weights": average}
            with torch.no_grad():
                wanted = model(*inputs, **asked)
            found, seen = operations_of(model, *inputs, **asked)
            assert "multi_head_attention_forward" not in seen
            torch.testing.assert_close(found, wanted, **TOLERANCE)


def test_causal_attention_of_heads_is_torchs() -> None:
    torch.manual_seed(0)
    model, x = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double().eval(), randn(SAMPLES, KEYS, WIDTH)
    mask = nn.Transformer.generate_square_subsequent_mask(KEYS, dtype=torch.float64)
    for need in (False, True):
        asked = {"attn_mask": mask, "is_causal": True, "need_weights": need}
        with torch.no_grad():
            wanted = model(x, x, x, **asked)
        torch.testing.assert_close(operations_of(model, x, x, x, **asked)[0], wanted, **TOLERANCE)


def test_one_tensor_for_query_key_and_value_has_three_projections() -> None:
    model, x = nn.MultiheadAttention(WIDTH, HEADS).double().eval(), randn(KEYS, SAMPLES, WIDTH)
    found, seen = operations_of(model, x, x, x)
    with torch.no_grad():
        torch.testing.assert_close(found, model(x, x, x), **TOLERANCE)
    assert seen.count("linear") == 4


def test_attention_that_draws_random_numbers_stays_whole() -> None:
    model, x = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.1).double().train(), randn(KEYS, SAMPLES, WIDTH)
    assert "multi_head_attention_forward" in operations_of(model, x, x, x)[1]
    assert parts_of("scaled_dot_product_attention", (x, x, x), {"dropout_p": 0.1}) is None


@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("mask", ["none", "causal", "boolean", "blind", "float", "of heads", "of samples"])
def test_attention_is_torchs(mask: str, scale: float | None, shared: bool) -> None:
    query = randn(SAMPLES, 4, QUERIES, WIDTH)
    key, value = (randn(SAMPLES, 2 if shared else 4, KEYS, WIDTH, seed=seed) for seed in (1, 2))
    seen = MASKS["boolean"].logical_not()
    masks = {
        "boolean": seen,
        "blind": seen & torch.tensor([[True], [False], [True]]),
        "float": MASKS["float"],
        "of heads": randn(1, 4, QUERIES, KEYS),
        "of samples": randn(SAMPLES, 1, QUERIES, KEYS) > 0,
    }
    options = {"attn_mask": masks.get(mask), "is_causal": mask == "causal", "scale": scale, "enable_gqa": shared}
    wanted = F.scaled_dot_product_attention(query, key, value, **options)
    found = decomposed_attention(query, key, value, **options)
    torch.testing.assert_close(found, wanted, **TOLERANCE)


def explicit_einsum(terms: tuple[str, str, str], left: Tensor, right: Tensor) -> Tensor:
    """Loops over all indices."""
    one, two, result = terms
    sizes = dict(zip(one, left.shape, strict=True)) | dict(zip(two, right.shape, strict=True))
    found = torch.zeros([sizes[i] for i in result], dtype=left.dtype)
    for values in itertools.product(*(range(size) for size in sizes.values())):
        at = dict(zip(sizes, values, strict=True))
        product = left[tuple(at[i] for i in one)] * right[tuple(at[i] for i in two)]
        found[tuple(at[i] for i in result)] += product
    return found


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data())
def test_einsum_of_two_operands_is_a_product(data: st.DataObject) -> None:
    """Indices are drawn into four groups: in both and kept, in both and summed, in one alone."""
    groups = [data.draw(st.integers(low, 2)) for low in (0, 1, 0, 0)]
    letters = iter(data.draw(st.permutations("abcdefgh")))
    batch, summed, rows, columns = ([next(letters) for _ in range(count)] for count in groups)
    one, two, result = (
        "".join(data.draw(st.permutations(part)))
        for part in (batch + summed + rows, batch + summed + columns, batch + rows + columns)
    )
    assume(len(one + two) <= 8)
    sizes = {index: data.draw(st.integers(1, 3)) for index in {*one, *two}}
    left, right = randn(*(sizes[i] for i in one)), randn(*(sizes[i] for i in two), seed=1)

    equation = f"{one},{two}->{result}"
    parts = parts_of("einsum", (equation, left, right), {})
    assert parts is not None
    found = parts(equation, left, right)
    torch.testing.assert_close(found, explicit_einsum((one, two, result), left, right), **TOLERANCE)
    torch.testing.assert_close(found, torch.einsum(equation, left, right), **TOLERANCE)


SHAPES = {"v": (3,), "m": (3, 3), "c": (2, 3, 3), "t": (4, 2, 3, 3)}
NOTATIONS = {
    "ij,jk": "mm",
    "ba, ac -> bc": "mm",
    "ij,ij->": "mm",
    "kj,ik": "mm",
    "...i,ij->...j": "tm",
    "i...,ij": "mm",
    "...ij,...jk->...ik": "tt",
    "b...i,...ij->b...j": "cm",
    "...ij,jk,kl->...il": "tmm",
    "nhts,nshd,hdc->ntc": "tttt",
    "i,ij,j->": "vmv",
}


def _operands(equation: str, kinds: str) -> list[Tensor]:
    if equation == "nhts,nshd,hdc->ntc":
        return [randn(2, 3, 4, 5), randn(2, 5, 3, 6, seed=1), randn(3, 6, 7, seed=2)]
    return [randn(*SHAPES[kind], seed=seed) for seed, kind in enumerate(kinds)]


@pytest.mark.parametrize(("equation", "kinds"), NOTATIONS.items(), ids=NOTATIONS.keys())
def test_einsum_as_it_may_be_written(equation: str, kinds: str) -> None:
    operands = _operands(equation, kinds)
    parts = parts_of("einsum", (equation, *operands), {})
    assert parts is not None
    torch.testing.assert_close(parts(equation, *operands), torch.einsum(equation, *operands), **TOLERANCE)


@pytest.mark.parametrize(
    ("equation", "kinds"),
    [("ii,ij->j", "mm"), ("i,j->ij", "vv"), ("ij,jk->i", "mm"), ("ij,ij->ij", "mm"), ("ij,jk,kj->i", "mmm")],
)
def test_einsum_that_is_no_product_stays_whole(equation: str, kinds: str) -> None:
    assert einsum_steps((equation, *_operands(equation, kinds))) is None


def test_einsum_that_repeats_an_operand_stays_whole() -> None:
    one, two = randn(1, 3), randn(3, 3)
    torch.einsum("ij,ij->", one, two)
    assert einsum_steps(("ij,ij->", one, two)) is None


@pytest.mark.parametrize("dims", [1, 2, ([0], [1]), ([1, -1], [0, -1]), ((2, 0), (1, 0))], ids=str)
def test_tensordot_is_a_product(dims: object) -> None:
    left, right = randn(3, 3, 3), randn(3, 3, 3, 2, seed=1).movedim(-1, 2 if dims == ([1, -1], [0, -1]) else 3)
    parts = parts_of("tensordot", (left, right), {"dims": dims})
    assert parts is not None
    found = parts(left, right, dims=dims)
    torch.testing.assert_close(found, torch.tensordot(left, right, dims=dims), **TOLERANCE)


def test_tensordot_that_sums_nothing_stays_whole() -> None:
    assert parts_of("tensordot", (randn(2), randn(3), 0), {}) is None
