"""Weight-only layers are near their reference, in the bytes of their format, and refuse other weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import InvalidRequest
from quantkit.runtime.weight_only.layer import MANY_ROWS, WeightOnlyLinear
from quantkit.runtime.weight_only.reference import weight_only_reference
from tests.runtime.test_int_layers import weight_of


@settings(deadline=None, max_examples=300)
@given(
    rows=st.sampled_from([0, 1, 2, 5, 17, MANY_ROWS, 40]),
    channels=st.integers(1, 5).map(lambda n: 16 * n),
    groups=st.integers(1, 4),
    group=st.sampled_from([32, 64, 128, 256]),
    zero=st.booleans(),
    expand=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_outputs_are_near_the_reference(rows, channels, groups, group, zero, expand, dtype) -> None:
    weight = weight_of(f"w4g{group}{'z' if zero else ''}", (channels, group * groups))
    x, bias = torch.randn(2, rows, group * groups).to(dtype), torch.randn(channels)
    layer = WeightOnlyLinear(weight, bias, expand)
    wanted = weight_only_reference(x.float(), weight, bias)
    found = layer(x)
    assert found.dtype == dtype and found.shape == wanted.shape
    if rows:  # bfloat16 has 8 bits, and rounds the operator's output too
        assert (found.float() - wanted).norm() < 2**-7 * wanted.norm()


@pytest.mark.parametrize("group", [32, 128])
def test_weights_take_the_bytes_of_their_format(group: int) -> None:
    weight = weight_of(f"w4g{group}", (32, 256))
    assert WeightOnlyLinear(weight).weight_bytes == weight.format.storage_bytes((32, 256))
    assert WeightOnlyLinear(weight).expanded_bytes == 0
    assert WeightOnlyLinear(weight, expand=True).expanded_bytes == 4 * 32 * 256


@pytest.mark.parametrize(("format", "shape"), [("w8g32", (16, 64)), ("w4g16", (16, 64)), ("w4g32", (24, 64))])
def test_other_weights_are_refused(format: str, shape: tuple[int, int]) -> None:
    with pytest.raises(InvalidRequest, match=f"Weight-only kernels run 4 bits in groups .* not {format} of shape"):
        WeightOnlyLinear(weight_of(format, shape))


def test_other_inputs_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="reads floating-point rows of 64 inputs"):
        WeightOnlyLinear(weight_of("w4g32", (16, 64)))(torch.zeros(3, 60))
