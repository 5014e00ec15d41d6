"""Packed codes come back exactly, take the bytes the formats promise, and lie where Python integers put them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.errors import CorruptFile
from quantkit.formats import Scheme, packed_bytes
from quantkit.numbers.packed_weight import pack_weight
from quantkit.numbers.packing import pack, pack_plane, split_planes, unpack, unpack_plane
from quantkit.numbers.uniform import QuantizedWeight

PLANES = {2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}
WIDTHS = sorted(PLANES)


def random_codes(shape: tuple[int, ...], bits: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-(1 << bits - 1), 1 << bits - 1, shape, generator=draw, dtype=torch.int8)


def packed_by_integers(codes: list[int], bits: int) -> bytes:
    """Each plane as one big little-endian number, high plane first."""
    done, rest = b"", bits
    for width in PLANES[bits]:
        rest -= width
        number = 0
        for position, code in enumerate(codes):
            plane = (code + (1 << bits - 1)) >> rest & ((1 << width) - 1)
            number |= plane << position * width
        done += number.to_bytes(math.ceil(len(codes) * width / 8), "little")
    return done


@settings(deadline=None, max_examples=200)
@given(bits=st.sampled_from(WIDTHS), data=st.data())
def test_bits_lie_where_python_integers_put_them(bits: int, data: st.DataObject) -> None:
    codes = data.draw(st.lists(st.integers(-(1 << bits - 1), (1 << bits - 1) - 1), max_size=50))
    found = pack(torch.tensor(codes, dtype=torch.int8), bits)
    assert found.dtype == torch.uint8
    assert found.numpy().tobytes() == packed_by_integers(codes, bits)


@settings(deadline=None, max_examples=200)
@given(
    bits=st.sampled_from(WIDTHS),
    shape=st.lists(st.integers(0, 5), max_size=4).map(tuple),
    seed=st.integers(0, 1000),
)
def test_codes_of_any_shape_come_back_in_the_promised_bytes(bits: int, shape: tuple[int, ...], seed: int) -> None:
    codes = random_codes(shape, bits, seed)
    packed = pack(codes, bits)
    assert packed.numel() == packed_bytes(codes.numel(), bits)
    assert torch.equal(unpack(packed, bits, shape), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_comes_back(bits: int) -> None:
    codes = torch.arange(-(1 << bits - 1), 1 << bits - 1).to(torch.int8)
    assert torch.equal(unpack(pack(codes, bits), bits, codes.shape), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_of_a_transposed_weight_are_packed_in_its_own_order(bits: int) -> None:
    codes = random_codes((5, 7), bits)
    assert torch.equal(pack(codes.t(), bits), pack(codes.t().contiguous(), bits))


@pytest.mark.parametrize("bits", WIDTHS)
def test_planes_put_together_are_the_unsigned_codes(bits: int) -> None:
    codes = random_codes((3, 11), bits)
    together = torch.zeros(33, dtype=torch.int64)
    planes = split_planes(codes, bits)
    for width, plane in planes:
        assert plane.dtype == torch.uint8 and int(plane.max()) < 1 << width
        together = together * 2**width + plane
    assert [width for width, _ in planes] == PLANES[bits]
    assert torch.equal(together, codes.reshape(-1).long() + 2 ** (bits - 1))


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64])
def test_plane_of_any_count_comes_back(width: int, count: int) -> None:
    values = torch.randint(0, 1 << width, (count,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = pack_plane(values, width)
    assert len(packed) == math.ceil(count * width / 8)
    assert torch.equal(unpack_plane(packed, width, count), values)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("change", [-1, 1])
def test_wrong_number_of_bytes_is_a_corrupt_file(bits: int, change: int) -> None:
    packed = pack(random_codes((3, 5), bits), bits)
    damaged = packed[:change] if change < 0 else torch.cat([packed, packed[:1]])
    with pytest.raises(CorruptFile, match=f"{len(damaged)} packed bytes found where 15 codes of {bits} bits take"):
        unpack(damaged, bits, (3, 5))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("suffix", ["", "g3", "z", "g9z", "sf16", "g3sf8", "g3zsf16"])
@pytest.mark.parametrize("shape", [(5, 9), (7, 1, 3, 3)])
def test_packed_weight_takes_the_bytes_its_format_promises(bits: int, suffix: str, shape: tuple[int, ...]) -> None:
    format = Scheme.parse(f"w{bits}{suffix}").weight
    scales = (shape[0], 9 // (format.group or 9))
    zero = random_codes(scales, bits) if format.zero_point else None
    weight = QuantizedWeight(random_codes(shape, bits), torch.ones(scales), zero, format)
    assert pack_weight(weight).nbytes == format.storage_bytes(shape)


def test_packed_bytes_of_a_known_weight() -> None:
    """16 x 27 codes of 3 bits: 108 bytes of 2-bit planes, 54 of 1-bit planes, 64 of scales."""
    format = Scheme.parse("w3").weight
    weight = QuantizedWeight(random_codes((16, 3, 3, 3), 3), torch.ones(16, 1), None, format)
    assert pack_weight(weight).nbytes == 226
