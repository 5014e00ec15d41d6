"""Composite functions as the calls they consist of, so that the products and the softmax inside can be seen, quantized
and exported: attention, the module ``nn.MultiheadAttention``, ``einsum`` and ``tensordot``.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Function = Callable[..., Any]
_ELLIPSIS = string.ascii_uppercase  # indices for the axes that an ellipsis stands for
_ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def parts_of(op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Function | None:
    """The function that computes what a call of ``op`` computes in separate torch calls; None where the call is not
    composite, or draws random numbers inside.
    """
    if op == "scaled_dot_product_attention":
        dropout = dict(zip(_ATTENTION, args, strict=False)).get("dropout_p", kwargs.get("dropout_p", 0.0))
        return None if dropout else decomposed_attention
    if op == "multi_head_attention_forward":
        given = signature(F.multi_head_attention_forward).bind(*args, **kwargs)
        given.apply_defaults()
        random = given.arguments["dropout_p"] and given.arguments["training"]
        static = given.arguments["static_k"] is not None or given.arguments["static_v"] is not None
        return None if random or static else (lambda *_, **__: attention_of_heads(**given.arguments))
    if op == "einsum" and (steps := einsum_steps(args)) is not None:
        return lambda _, first, *others: reduce(_contracted, zip(steps, others, strict=True), first)
    if op == "tensordot":
        return _tensordot_parts(*args, **kwargs)
    return None


def decomposed_attention(query: Tensor, key: Tensor, value: Tensor, *more: Any, **options: Any) -> Tensor:
    """What ``torch.nn.functional.scaled_dot_product_attention`` computes, by its documented definition, in separate
    calls. Scores are scaled after the product, so that codes of queries and keys are multiplied as they are.
    """
    given = dict(zip(_ATTENTION[3:], more, strict=False)) | options
    attn_mask, is_causal, scale = given.get("attn_mask"), given.get("is_causal"), given.get("scale")
    assert not given.get("dropout_p"), "checked by parts_of"
    if given.get("enable_gqa"):
        key, value = (_for_every_query(x, query.shape[-3] // x.shape[-3]) for x in (key, value))
    scores = torch.matmul(query, key.transpose(-2, -1))
    scores = scores * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    blind = None
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        blind = None if is_causal else attn_mask.any(-1, keepdim=True).logical_not()
        seen = attn_mask if blind is None else attn_mask.logical_or(blind)
        scores = scores.masked_fill(seen.logical_not(), -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    mixed = torch.matmul(torch.softmax(scores, -1), value)
    return mixed if blind is None else mixed.masked_fill(blind, 0.0)  # what sees nothing, as padding, is zero


def _for_every_query(heads: Tensor, times: int) -> Tensor:
    """Heads (..., heads, length, width), each for ``times`` heads of queries, by calls that codes pass through."""
    expanded = heads.unsqueeze(-3).expand(*heads.shape[:-2], times, *heads.shape[-2:])
    return expanded.flatten(-4, -3)


def attention_of_heads(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int, out_proj_weight: Tensor, **given: Any
) -> tuple[Tensor, Tensor | None]:
    """What ``torch.nn.functional.multi_head_attention_forward`` computes: its three projections are products with
    slices of the packed weight, whether or not query, key and value are one tensor.
    """
    batched = query.dim() == 3
    query, key, value = (x if batched else x.unsqueeze(1) for x in (query, key, value))
    if given["use_separate_proj_weight"]:
        weights = [given[f"{name}_proj_weight"] for name in "qkv"]
    else:
        weights = given["in_proj_weight"].chunk(3)
    biases = [None] * 3 if given["in_proj_bias"] is None else given["in_proj_bias"].chunk(3)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    samples = k.shape[1]
    if given["bias_k"] is not None:
        k, v = (torch.cat([x, given[f"bias_{name}"].repeat(1, samples, 1)]) for x, name in ((k, "k"), (v, "v")))
    mask = _mask_of_heads(given["attn_mask"], given["key_padding_mask"], q, num_heads)

    # (length, samples, width) -> (samples, heads, length, width of a head)
    q, k, v = (x.reshape(x.shape[0], samples, num_heads, -1).permute(1, 2, 0, 3) for x in (q, k, v))
    if given["add_zero_attn"]:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    scores = torch.matmul(q, k.transpose(-2, -1)) * (1 / math.sqrt(q.shape[-1]))
    if mask is not None:
        scores = scores + F.pad(mask, (0, k.shape[-2] - mask.shape[-1]))  # what was appended can be seen by all
    probabilities = torch.softmax(scores, -1)
    mixed = torch.matmul(probabilities, v).permute(2, 0, 1, 3)
    output = F.linear(mixed.reshape(*query.shape[:2], -1), out_proj_weight, given["out_proj_bias"])

    shown = (
        (probabilities.mean(1) if given["average_attn_weights"] else probabilities) if given["need_weights"] else None
    )
    if batched:
        return output, shown
    return output.squeeze(1), None if shown is None else shown.squeeze(0)


def _mask_of_heads(mask: Tensor | None, padding: Tensor | None, query: Tensor, heads: int) -> Tensor | None:
    """Both masks as one that is added to scores (samples, heads, queries, keys)."""
    if mask is not None:
        mask = _added(mask, query)
        mask = mask if mask.dim() == 2 else mask.reshape(-1, heads, *mask.shape[1:])
    if padding is None:
        return mask
    added = _added(padding if padding.dim() == 2 else padding.unsqueeze(0), query)[:, None, None, :]
    return added if mask is None else mask + added


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as numbers to be added: minus infinity where a boolean one is set."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros(mask.shape, dtype=like.dtype, device=mask.device).masked_fill(mask, -math.inf)


Terms = tuple[str, str, str]  # the indices of two operands and of their product


def einsum_steps(args: tuple[Any, ...]) -> list[Terms] | None:
    """The products of two that make up ``einsum(equation, first, second, ...)``, each of what was made before and the
    next operand; None where an index repeats in an operand, or where one of them sums nothing.
    """
    equation, *operands = args
    if not isinstance(equation, str) or len(operands) < 2 or not all(isinstance(x, Tensor) for x in operands):
        return None
    left, arrow, result = equation.replace(" ", "").partition("->")
    given, dots = left.split(","), _ELLIPSIS[: max(x.dim() for x in operands)]
    terms = [
        term.replace("...", dots[len(dots) - x.dim() + len(term) - 3 :])
        for term, x in zip(given, operands, strict=True)
    ]
    every = "".join(terms)
    if not arrow:
        result = "..." + "".join(sorted(i for i in every if every.count(i) == 1 and i not in dots))
    result = result.replace("...", "".join(i for i in dots if i in every))
    if not _one_size_each(terms, operands) or not {*result} <= {*every} or len({*result}) != len(result):
        return None

    steps, made = [], terms[0]
    for position, term in enumerate(terms[1:], 2):
        later = {*"".join(terms[position:]), *result}
        left_over = [i for i in dict.fromkeys(made + term) if i in later]
        product = result if position == len(terms) else "".join(left_over)
        if not ({*made} & {*term}) - later or ({*made} ^ {*term}) - later:
            return None
        steps.append((made, term, product))
        made = product
    return steps


def _one_size_each(terms: list[str], operands: Sequence[Tensor]) -> bool:
    """Whether every index stands once in a term, and for one size in all of them."""
    sizes = {
        (i, size) for term, x in zip(terms, operands, strict=True) for i, size in zip(term, x.shape, strict=False)
    }
    fits = all(len({*term}) == len(term) == x.dim() for term, x in zip(terms, operands, strict=True))
    return fits and len(sizes) == len({i for i, _ in sizes}) and "".join(terms).isalpha()


def _tensordot_parts(left: Tensor, right: Tensor, dims: Any = 2, out: Tensor | None = None) -> Function | None:
    """The product that ``tensordot`` is; None where nothing is summed, or ``dims`` is a tensor."""
    if isinstance(dims, int):
        dims = [*range(left.dim() - dims, left.dim())], [*range(dims)]
    if isinstance(dims, Tensor) or out is not None or not len(dims[0]):
        return None
    pairs = {b % right.dim(): a % left.dim() for a, b in zip(*dims, strict=True)}
    one = _ELLIPSIS[: left.dim()]
    two = "".join(one[pairs[i]] if i in pairs else _ELLIPSIS[left.dim() + i] for i in range(right.dim()))
    terms = (one, two, "".join(i for i in one + two if (i in one) != (i in two)))
    return lambda left, right, *_, **__: contraction(terms, left, right)


def _contracted(made: Tensor, step: tuple[Terms, Tensor]) -> Tensor:
    return contraction(step[0], made, step[1])


def contraction(terms: Terms, left: Tensor, right: Tensor) -> Tensor:
    """``einsum`` of two operands as one batched product of matrices."""
    one, two, result = terms
    batch = [i for i in one if i in two and i in result]
    summed = [i for i in one if i in two and i not in result]
    rows = [i for i in one if i not in two]
    columns = [i for i in two if i not in one]
    sizes = dict(zip(one, left.shape, strict=True)) | dict(zip(two, right.shape, strict=True))

    def laid_out(x: Tensor, term: str, first: list[str], second: list[str]) -> Tensor:
        order = [*batch, *first, *second]
        x = x.permute([term.index(i) for i in order])
        shape = [sizes[i] for i in batch]
        return x.reshape(*shape, math.prod(sizes[i] for i in first), math.prod(sizes[i] for i in second))

    product = torch.matmul(laid_out(left, one, rows, summed), laid_out(right, two, summed, columns))
    made = [*batch, *rows, *columns]
    return product.reshape([sizes[i] for i in made]).permute([made.index(i) for i in result])
