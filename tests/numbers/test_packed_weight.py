"""Packed weights come back exactly, in the bytes of their format, also from a safetensors file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quantkit.errors import CorruptFile, InvalidRequest
from quantkit.formats import Scheme
from quantkit.numbers.packed_weight import (
    PackedWeight,
    pack_weight,
    unpack_weight,
)
from quantkit.numbers.uniform import QuantizedWeight
from tests.numbers.test_packing import random_codes

SHAPES = [(5, 24), (3, 2, 3, 4), (1, 24)]


def weight_of(format: str, shape: tuple[int, ...] = (5, 24), seed: int = 0) -> QuantizedWeight:
    """Random codes, zero points and scales that the format's scale type holds."""
    parsed = Scheme.parse(format).weight
    draw = torch.Generator().manual_seed(seed)
    scales = (shape[0], 24 // (parsed.group or 24))
    scale = torch.randint(1, 16, scales, generator=draw) / 8
    zero = random_codes(scales, parsed.bits, seed + 1) if parsed.zero_point else None
    return QuantizedWeight(random_codes(shape, parsed.bits, seed), scale, zero, parsed)


def assert_same(found: QuantizedWeight, wanted: QuantizedWeight) -> None:
    assert found.format == wanted.format
    assert torch.equal(found.codes, wanted.codes) and torch.equal(found.scale, wanted.scale)
    assert (found.zero_point is None) == (wanted.zero_point is None)
    assert wanted.zero_point is None or torch.equal(found.zero_point, wanted.zero_point)


@settings(deadline=None, max_examples=100)
@given(
    bits=st.sampled_from([2, 3, 4, 5, 6, 7, 8]),
    suffix=st.sampled_from(["", "g8", "z", "g12z", "sf16", "g6sf8", "g8zsf32"]),
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 1000),
)
def test_weights_come_back_in_the_bytes_of_their_format(bits: int, suffix: str, shape, seed: int) -> None:
    weight = weight_of(f"w{bits}{suffix}", shape, seed)
    packed = pack_weight(weight)
    assert packed.nbytes == weight.format.storage_bytes(shape)
    assert_same(unpack_weight(packed), weight)


@pytest.mark.parametrize("format", ["w4", "w3g8z", "w8g4sf8", "w2sf16"])
def test_weights_come_back_from_a_file(format: str, tmp_path: Path) -> None:
    weight = weight_of(format)
    packed = pack_weight(weight)
    save_file(packed.tensors("layer.weight"), tmp_path / "w.safetensors")
    read = PackedWeight.of_tensors(load_file(tmp_path / "w.safetensors"), "layer.weight", (5, 24), weight.format)
    assert_same(unpack_weight(read), weight)


def test_scales_their_type_cannot_hold_are_refused() -> None:
    weight = QuantizedWeight(random_codes((2, 8), 4), torch.full((2, 1), 0.1), None, Scheme.parse("w4sf16").weight)
    with pytest.raises(InvalidRequest, match=r"scales of w4sf16 are not torch.float16 numbers"):
        pack_weight(weight)


def test_damaged_tensors_are_named() -> None:
    tensors = pack_weight(weight_of("w4z")).tensors("a")
    format = Scheme.parse("w4z").weight
    with pytest.raises(CorruptFile, match=r"zero points of 'a' \(w4z\) are missing"):
        PackedWeight.of_tensors({k: t for k, t in tensors.items() if "zero" not in k}, "a", (5, 24), format)
    with pytest.raises(CorruptFile, match=r"'a' has codes of torch.int32"):
        PackedWeight.of_tensors(tensors | {"a.codes": tensors["a.codes"].int()}, "a", (5, 24), format)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_large_layer_comes_back(bits: int) -> None:
    codes = random_codes((4096, 4096), bits)
    weight = QuantizedWeight(codes, torch.ones(4096, 32), None, Scheme.parse(f"w{bits}g128").weight)
    assert torch.equal(unpack_weight(pack_weight(weight)).codes, codes)
