"""What a model's code computes from sizes is remembered, so that it holds at other sizes."""

from __future__ import annotations

import copy
import math
import operator
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from quantkit.program.record import record
from quantkit.program.sizes import Extent, Ratio, Size, following

Node = tuple  # ("size", axis) | ("number", value) | (name, operands...)
BINARY = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "truediv": operator.truediv,
    "mod": operator.mod,
}
UNARY = {
    "neg": operator.neg,
    "abs": abs,
    "floor": math.floor,
    "ceil": math.ceil,
    "trunc": math.trunc,
    "round": round,
    "square": lambda x: x**2,
}
WHOLE = st.integers(-4, 5).map(lambda x: ("number", x))
NUMBERS = WHOLE | st.sampled_from([0.5, 1.5, -0.25]).map(lambda x: ("number", x))


def _larger(inner: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    """Expressions of others; a number alone is on the left where it is whole: a float there takes what is on the
    right for a plain number.
    """
    binary, unary = st.sampled_from(sorted(BINARY)), st.sampled_from(sorted(UNARY))
    return st.one_of(
        st.tuples(binary, inner, inner | NUMBERS), st.tuples(binary, WHOLE, inner), st.tuples(unary, inner)
    )


EXPRESSIONS = st.recursive(st.integers(0, 2).map(lambda axis: ("size", axis)), _larger, max_leaves=6)
SHAPES = st.tuples(*[st.integers(1, 6)] * 3)


def value_of(node: Node, sizes: tuple[float, ...]) -> float:
    """The slow twin: plain Python on plain numbers, or on whatever stands for them."""
    name, *operands = node
    if name == "size":
        return sizes[operands[0]]
    if name == "number":
        return operands[0]
    function: Callable[..., float] = (BINARY | UNARY)[name]
    return function(*(value_of(operand, sizes) for operand in operands))


@settings(deadline=None, derandomize=True)
@given(EXPRESSIONS, SHAPES, SHAPES)
def test_any_expression_is_evaluated_at_other_sizes(
    node: Node, first: tuple[int, ...], other: tuple[int, ...]
) -> None:
    recording = object()
    sizes = tuple(following(size, Extent(3, axis), recording) for axis, size in enumerate(first))
    try:
        plain, wanted = value_of(node, first), value_of(node, other)
    except (ZeroDivisionError, OverflowError):
        assume(False)
    found = value_of(node, sizes)
    assert found == plain
    assert isinstance(found, Size | Ratio)
    assert found.expression.evaluate({3: other}) == wanted


class Scaled(nn.Module):
    """Multiplies by an expression of the input's sizes, and repeats by another."""

    def __init__(self, factor: Node, repeats: Node) -> None:
        super().__init__()
        self.factor, self.repeats = factor, repeats

    def forward(self, x: Tensor) -> Tensor:
        factor = value_of(self.factor, x.shape)
        repeats = value_of(self.repeats, (x.size(0), x.size(1), x.size(dim=-1))) + x.numel()
        return (x * factor).repeat(abs(round(repeats)) % 3 + 1, 1, 1)


@settings(deadline=None, derandomize=True)
@given(EXPRESSIONS, EXPRESSIONS, SHAPES, SHAPES)
def test_any_expression_is_replayed_at_other_sizes(
    factor: Node, repeats: Node, first: tuple[int, ...], other: tuple[int, ...]
) -> None:
    model = Scaled(factor, repeats).eval()
    try:
        wanted = [model(torch.ones(shape)) for shape in (first, other)][1]
    except (ZeroDivisionError, OverflowError):
        assume(False)
    program = record(model, ((torch.ones(first),), {}))
    found = program.replay(program.entering(model, ((torch.ones(other),), {})), {}, program.outputs)[0]
    assert torch.equal(found, wanted)


def test_numbers_of_two_recordings_do_not_mix() -> None:
    one, other = following(3, Extent(0, 0), object()), following(4, Extent(0, 1), object())
    assert type(one + other) is int
    assert one + other == 7


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_are_plain_numbers(copied: Callable) -> None:
    size = following(3, Extent(0, 0), object())
    assert type(copied(size)) is int
    assert type(copied(size / 2)) is float
