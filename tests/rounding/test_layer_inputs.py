"""The input matrix of a layer times its weight is the layer's output, for every way to call it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from quantkit.program.intercept import intercept
from quantkit.program.layers import layer_kind
from tests.rounding.columns import input_columns

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def random_tensor(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def as_rows(output: Tensor, dims: int, groups: int) -> Tensor:
    """A convolution's output (batch, O, *positions) as (groups, rows, O / groups), samples innermost."""
    batched = output if output.dim() == dims + 2 else output[None]
    flat = batched.flatten(2)
    return torch.stack([part.permute(2, 0, 1).flatten(0, 1) for part in flat.chunk(groups, 1)])


def assert_product_is_output(columns: Tensor, weight: Tensor, output_rows: Tensor) -> None:
    groups = columns.shape[0]
    assert columns.shape == (groups, output_rows.shape[1], math.prod(weight.shape[1:]))
    for g, rows in enumerate(weight.flatten(1).chunk(groups)):
        torch.testing.assert_close(columns[g] @ rows.T, output_rows[g], rtol=1e-10, atol=1e-10)


def assert_call_matches(dims: int, x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> None:
    output = CONVOLUTIONS[dims](x, weight, *args, **kwargs)
    groups = x.shape[-dims - 1] // weight.shape[1]
    columns = input_columns(f"conv{dims}d", (x, weight, *args), kwargs)
    assert_product_is_output(columns, weight, as_rows(output, dims, groups))


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (2, 3, 4, 6)])
@pytest.mark.parametrize("by_keyword", [False, True])
def test_linear_of_any_rank(shape: tuple[int, ...], by_keyword: bool) -> None:
    x, weight = random_tensor(*shape), random_tensor(4, 6)
    call = ((), {"input": x, "weight": weight}) if by_keyword else ((x, weight), {})
    columns = input_columns("linear", *call)
    assert_product_is_output(columns, weight, F.linear(x, weight).reshape(1, -1, 4))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2},
        {"padding": 1},
        {"dilation": 2},
        {"padding": "same"},
        {"padding": "same", "dilation": 2},
        {"padding": "valid", "stride": 2},
        {"stride": (2,), "padding": (1,), "dilation": (2,)},
        {"stride": 3, "padding": 2, "dilation": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("groups", [1, 2, 4], ids=["plain", "grouped", "depthwise"])
def test_convolution(dims: int, options: dict[str, Any], groups: int) -> None:
    x, weight = random_tensor(2, 4, *(8, 7, 6)[:dims]), random_tensor(8, 4 // groups, *(3, 2, 3)[:dims])
    assert_call_matches(dims, x, weight, groups=groups, **options)


@pytest.mark.parametrize(
    ("dims", "options"),
    [
        (2, {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)}),
        (2, {"padding": "same", "dilation": (2, 3)}),
        (3, {"stride": (1, 2, 3), "padding": (2, 0, 1), "dilation": (2, 1, 1)}),
        (2, {"stride": [2, 1], "padding": torch.Size((1, 0))}),
    ],
    ids=str,
)
def test_options_that_differ_by_axis(dims: int, options: dict[str, Any]) -> None:
    x, weight = random_tensor(2, 4, *(8, 7, 6)[:dims]), random_tensor(6, 2, *(2, 3, 2)[:dims])
    assert_call_matches(dims, x, weight, groups=2, **options)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_positional_arguments(dims: int) -> None:
    x, weight = random_tensor(2, 4, *(6, 5, 4)[:dims]), random_tensor(6, 2, *(3, 2, 2)[:dims])
    assert_call_matches(dims, x, weight, None, 2, 1, 1, 2)


def test_arguments_all_by_keyword() -> None:
    x, weight = random_tensor(2, 4, 8, 7), random_tensor(6, 2, 3, 3)
    call = {"input": x, "weight": weight, "bias": None, "stride": 2, "groups": 2}
    assert_product_is_output(input_columns("conv2d", (), call), weight, as_rows(F.conv2d(**call), 2, 2))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_one_unbatched_sample(dims: int) -> None:
    x, weight = random_tensor(4, *(6, 5, 4)[:dims]), random_tensor(6, 2, *(3, 2, 2)[:dims])
    assert_call_matches(dims, x, weight, padding=1, groups=2)


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_any_two_dimensional_convolution(data: st.DataObject) -> None:
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel, stride, dilation = (data.draw(pair) for _ in range(3))
    padding = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    groups, per_group, outputs, batch = (data.draw(st.integers(1, 3)) for _ in range(4))
    size = [data.draw(st.integers(d * (k - 1) + 1, 9)) for d, k in zip(dilation, kernel, strict=True)]
    x, weight = random_tensor(batch, groups * per_group, *size), random_tensor(groups * outputs, per_group, *kernel)
    assert_call_matches(2, x, weight, stride=stride, padding=padding, dilation=dilation, groups=groups)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 3),
        nn.Conv1d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 8, 3, padding="same", groups=4),
        nn.Conv2d(4, 6, (3, 2), padding=(2, 1), padding_mode="circular", groups=2),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        nn.Conv3d(4, 4, 2, dilation=2, padding="valid"),
    ],
    ids=str,
)
def test_modules_as_they_call_torch(layer: nn.Module) -> None:
    """Padding that a module applies itself is part of the inputs."""
    layer, kind = layer.double(), layer_kind(layer)
    x = random_tensor(2, 4, *(6,) * (2 if kind == "linear" else int(kind[4])))
    seen: list[Tensor] = []

    def handler(key: Any, func: Any, args: Any, kwargs: Any) -> Any:
        if key.op == kind:
            seen.append(input_columns(kind, args, kwargs))
        return func(*args, **kwargs)

    with torch.no_grad(), intercept(layer, handler):
        output = layer(x)
    (columns,), dims = seen, x.dim() - 2
    shift = layer.bias if kind == "linear" else layer.bias.reshape(-1, *(1,) * dims)
    plain = (output - shift).detach()
    rows = plain.reshape(1, -1, 3) if kind == "linear" else as_rows(plain, dims, columns.shape[0])
    assert_product_is_output(columns, layer.weight.detach(), rows)
