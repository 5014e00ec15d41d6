"""Codes of tokens: a scale for each row, by the definition, also where a row holds nothing."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from quantkit.numbers.per_token import TokenRange
from quantkit.runtime.int_linear.reference import quantize_rows

VALUES = st.floats(-1e6, 1e6, width=32)


def on_its_grid(row: np.ndarray, bits: int) -> np.ndarray:
    """One row, by the definition: symmetric, the largest magnitude is the top code."""
    top = np.float32(2 ** (bits - 1) - 1)
    scale = max(np.abs(row).max() / top, np.finfo(np.float32).tiny)
    codes = np.rint(row / scale)
    assert np.abs(codes).max() <= top
    return codes * scale


@given(arrays(np.float32, (3, 2, 5), elements=VALUES), st.integers(2, 8))
def test_every_row_is_quantized_by_itself(x: np.ndarray, bits: int) -> None:
    found = TokenRange(bits).fake_quantize(torch.from_numpy(x)).numpy()
    wanted = np.stack([on_its_grid(row, bits) for row in x.reshape(-1, 5)]).reshape(x.shape)
    np.testing.assert_array_equal(found, wanted)


@given(arrays(np.float32, (4, 6), elements=VALUES))
def test_eight_bits_are_those_of_the_integer_kernels(x: np.ndarray) -> None:
    codes, scale = quantize_rows(torch.from_numpy(x))
    assert torch.equal(TokenRange(8).fake_quantize(torch.from_numpy(x)), codes * scale.unsqueeze(1))


def test_rows_of_zeros_stay_zero_and_gradients_pass() -> None:
    x = torch.tensor([[0.0, 0.0], [3.0, -1.1]], requires_grad=True)
    y = TokenRange(4).fake_quantize(x)
    assert y.tolist()[0] == [0.0, 0.0]
    (y * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[1.0, 2.0], [3.0, 4.0]]
