"""Float16 weights are numpy's: values, spacing, limits; and their tensors come back from a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quantkit.errors import CorruptFile, InvalidRequest
from quantkit.formats import Scheme, WeightFormat
from quantkit.numbers.half import HalfWeight, half_problem
from quantkit.numbers.packed_weight import stored_bytes, stored_tensors, stored_weight
from quantkit.rounding.weights import quantize_weight, rounding_note
from tests.program.models import randn

W16 = WeightFormat("16")
NUMBERS = st.floats(-65504, 65504, width=32)


@given(st.lists(NUMBERS, min_size=1, max_size=20))
def test_values_are_those_of_numpy(numbers: list[float]) -> None:
    weight = np.array([numbers], np.float32)
    found = HalfWeight.of(torch.from_numpy(weight))
    assert np.array_equal(found.values.numpy(), weight.astype(np.float16))
    assert np.array_equal(found.dequantize().numpy(), weight.astype(np.float16).astype(np.float32))
    assert np.array_equal(found.fake_quantize(torch.from_numpy(weight)).numpy(), found.dequantize().numpy())


@given(st.lists(st.floats(-60000, 60000, width=32), min_size=1, max_size=20))
def test_steps_are_the_spacing_of_numpy(numbers: list[float]) -> None:
    found = HalfWeight.of(torch.tensor([numbers]))
    assert np.array_equal(found.steps().numpy(), np.spacing(np.abs(found.values.numpy())).astype(np.float32))


def test_subnormals_round_and_what_is_smaller_vanishes() -> None:
    weight = torch.tensor([[2.0**-24, 1.4 * 2.0**-24, 2.0**-26, -(2.0**-15)]])
    assert half_problem(weight) == ""
    assert HalfWeight.of(weight).dequantize().tolist() == [[2.0**-24, 2.0**-24, 0.0, -(2.0**-15)]]


@pytest.mark.parametrize(("largest", "fits"), [(65504.0, True), (-65504.0, True), (65505.0, False), (-70000.0, False)])
def test_what_is_beyond_the_largest_number_is_refused(largest: float, fits: bool) -> None:
    weight = torch.tensor([[1.0, largest]])
    assert (half_problem(weight) == "") is fits
    if not fits:
        with pytest.raises(InvalidRequest, match=rf"its weight reaches {abs(largest):g}, and float16 ends at 65504"):
            HalfWeight.of(weight)


def test_two_bytes_an_element_come_back_from_a_file(tmp_path: Path) -> None:
    found = HalfWeight.of(randn(3, 2, 5))
    assert stored_bytes(found) == W16.storage_bytes((3, 2, 5)) == 60
    save_file(stored_tensors(found, "a"), tmp_path / "w.safetensors")
    read = load_file(tmp_path / "w.safetensors")
    assert {name: tensor.dtype for name, tensor in read.items()} == {"a.values": torch.float16}
    assert torch.equal(stored_weight(read, "a", (3, 2, 5), W16).dequantize(), found.dequantize())


@pytest.mark.parametrize("tensors", [{}, {"a.values": torch.zeros(2, 2)}, {"a.values": torch.zeros(3).half()}])
def test_another_tensor_in_the_file_is_refused(tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(CorruptFile, match=r"'a' \(w16\) has values in torch.float16 of shape \(2, 2\); found:"):
        stored_weight(tensors, "a", (2, 2), W16)


def test_no_rounding_changes_what_is_nearest() -> None:
    weight, w4 = randn(4, 8), Scheme.parse("w4").weight
    assert w4 is not None
    both = quantize_weight(weight, [W16, w4], rounding="nearest")
    alone = quantize_weight(weight, [W16], rounding="gptq")
    assert torch.equal(both.weights[W16].dequantize(), weight.half().float())
    assert torch.equal(alone.weights[W16].dequantize(), weight.half().float())
    assert both.weights[w4].integer
    assert rounding_note("a", alone, "gptq") == "nearest float16"
