"""Schemes read and print as the design's grammar says, and their bytes are those of counting code by code."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import InvalidRequest, QuantkitError
from quantkit.formats import (
    ActivationFormat,
    Scheme,
    WeightFormat,
    bit_planes,
    check_group,
    packed_bytes,
)
from tests.scheme_grammar import BITS, PLANES, SCHEMES, WEIGHTS

formats = st.sampled_from(list(BITS))
coded = st.sampled_from([fmt for fmt in BITS if fmt not in ("16", "nvfp4", "mxfp4")])
counts = st.integers(1, 40)


def test_every_scheme_of_the_grammar_prints_as_it_was_written() -> None:
    assert len(SCHEMES) == 1 + len(WEIGHTS) * 78 + len(WEIGHTS) + 78 and len(WEIGHTS) == 7 * 24 + 3 * 12 + 3
    assert [text for text in SCHEMES if str(Scheme.parse(text)) != text] == []


def test_no_two_schemes_of_the_grammar_read_as_the_same() -> None:
    assert len({Scheme.parse(text) for text in SCHEMES}) == len(SCHEMES)


@given(fmt=coded, group=st.none() | counts, zero=st.booleans(), scale=st.sampled_from(["", "f32", "f16", "f8", "i8"]))
def test_each_part_of_a_weight_format_is_read(fmt: str, group: int | None, zero: bool, scale: str) -> None:
    zero = zero and fmt.isdigit()
    text = f"w{fmt}" + (f"g{group}" if group else "") + "z" * zero + (f"s{scale}" if scale else "")
    scheme = Scheme.parse(text)
    assert scheme == Scheme(WeightFormat(fmt, group or 0, zero, scale))
    assert scheme.weight is not None and scheme.weight.bits == BITS[fmt]
    assert scheme.weight.scale == (scale or ("f16" if group and fmt.isdigit() else "f32"))
    assert scheme.weight.is_integer == (fmt in "2 3 4 5 6 7 8".split())
    assert scheme.has_codes and not scheme.weight.is_half


@pytest.mark.parametrize("text", ["w16g32", "w16z", "w16sf16", "w16g8zsf8a8"])
def test_float16_values_have_no_scales_to_ask_for(text: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"The scheme '{text}' asks for groups, zero points or scales .* 'w16'"):
        Scheme.parse(text)


def test_a_float16_weight_is_a_scheme_without_codes() -> None:
    scheme = Scheme.parse("w16")
    assert scheme.weight is not None and scheme.weight.is_half and not scheme.weight.is_integer
    assert not scheme.has_codes and not scheme.is_float and not Scheme().has_codes
    assert Scheme.parse("a8").has_codes


@given(fmt=formats, dynamic=st.booleans(), group=st.none() | counts)
def test_each_part_of_an_activation_format_is_read(fmt: str, dynamic: bool, group: int | None) -> None:
    scheme = Scheme.parse(f"a{fmt}" + "d" * dynamic + (f"g{group}" if group else ""))
    assert scheme == Scheme(None, ActivationFormat(fmt, dynamic, group or 0))
    assert scheme.activation is not None and scheme.activation.bits == BITS[fmt]


@pytest.mark.parametrize(("text", "printed"), [("w4g64sf16", "w4g64"), ("w3zsf32a8", "w3za8"), ("w2g8zsf16", "w2g8z")])
def test_the_usual_type_of_scales_is_not_printed(text: str, printed: str) -> None:
    assert str(Scheme.parse(text)) == printed and Scheme.parse(text) == Scheme.parse(printed)


def test_case_and_surrounding_space_do_not_matter() -> None:
    assert str(Scheme.parse("  W4G64ZA8D\n")) == "w4g64za8d"
    assert Scheme.parse("Float").is_float


def test_the_schemes_named_in_the_design_mean_what_it_says() -> None:
    fireq = Scheme.parse("w4g128sf8afp8d")
    assert fireq.weight == WeightFormat("4", group=128, scale="f8")
    assert fireq.activation == ActivationFormat("fp8", dynamic=True)
    assert Scheme.parse("a4dg64") == Scheme(None, ActivationFormat("4", dynamic=True, group=64))
    assert Scheme.parse("w4") == Scheme(WeightFormat("4"), None)
    assert Scheme.parse("w4").with_activation(ActivationFormat("8")) == Scheme.parse("w4a8")


UNREADABLE = (
    "|w|a|8|w1|w9|w10|w32|w04|a8w4|w4w4|w4a8a8|w4d|w4zg32|w4g0|w4g064|w4g|w4g-1|w4gz|w4sf64|w4sf16z|a8z|a8sf16|a8gd"
    "|a8g4d|floata8|w4float|w4 a8|fp8|wfp8e4m3|w4.5|w4a8!|w4-a8|int8"
).split("|")


@pytest.mark.parametrize("text", UNREADABLE)
def test_text_outside_the_grammar_is_refused_with_what_is_expected(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Scheme.parse(text)
    assert f"Unknown scheme {text!r}. Expected 'float' or formats such as 'w4a8'" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "kind"), [(None, "NoneType"), (4, "int"), (["w4a8"], "list"), (b"w4a8", "bytes")], ids=repr
)
def test_a_scheme_that_is_not_text_is_refused(value: object, kind: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"A scheme is text such as 'w4a8' or 'float', not {kind}\."):
        Scheme.parse(value)  # type: ignore[arg-type]


@given(st.text(alphabet="wagzdsfpelomnvxt 0123456789", max_size=12))
def test_any_text_is_either_refused_or_prints_as_what_it_is(text: str) -> None:
    try:
        scheme = Scheme.parse(text)
    except QuantkitError:
        return
    assert Scheme.parse(str(scheme)) == scheme
    assert str(scheme) == text.strip() or "sf" in text  # the usual type of scales may be named


def counted_bytes(count: int, bits: int) -> int:
    """Bytes of codes put into bytes one at a time, each plane starting a new byte."""
    total = 0
    for width in PLANES[bits]:
        free = 0
        for _ in range(count):
            if free < width:
                total, free = total + 1, 8
            free -= width
    return total


def counted_weight_bytes(weight: WeightFormat, outputs: int, inputs: int) -> int:
    """Codes, scales and zero points of a weight, each scale met by walking along the inputs of every channel."""
    scales = sum(1 for _ in range(outputs) for k in range(inputs) if k % (weight.group or inputs) == 0)
    zeros = counted_bytes(scales, BITS[weight.fmt]) if weight.zero_point else 0
    return (
        counted_bytes(outputs * inputs, BITS[weight.fmt])
        + scales * {"f32": 4, "f16": 2, "f8": 1, "i8": 1}[weight.scale]
        + {"f8": 4, "i8": 2 * outputs}.get(weight.scale, 0)  # a number for all of them, or for each channel
        + zeros
    )


@given(
    fmt=coded,
    outputs=st.integers(1, 9),
    groups=st.integers(1, 5),
    group=st.integers(1, 12),
    kernel=st.sampled_from([(), (1,), (3,), (3, 3), (2, 3, 1)]),
    grouped=st.booleans(),
    zero=st.booleans(),
    scale=st.sampled_from(["f32", "f16", "f8", "i8"]),
)
def test_storage_bytes_are_those_of_counting(
    fmt: str, outputs: int, groups: int, group: int, kernel: tuple[int, ...], grouped: bool, zero: bool, scale: str
) -> None:
    inputs = groups * group
    for size in kernel:
        inputs *= size
    weight = WeightFormat(fmt, group if grouped else 0, zero, scale)
    counted = counted_weight_bytes(weight, outputs, inputs)
    assert weight.storage_bytes((outputs, groups * group, *kernel)) == counted


@pytest.mark.parametrize(
    ("text", "shape", "size_bytes"),
    [
        ("w8", (10, 64), 640 + 10 * 4),
        ("w4", (10, 64), 320 + 10 * 4),
        ("w3", (16, 3, 3, 3), 108 + 54 + 16 * 4),  # 432 codes: a 2-bit plane and a 1-bit plane
        ("w7", (1, 5), 3 + 2 + 1 + 4),  # 5 codes: 20, 10 and 5 bits, each padded to bytes
        ("w4g32z", (10, 64), 320 + 20 * 2 + 10),
        ("w4g32zsf32", (10, 64), 320 + 20 * 4 + 10),
        ("w2g32zsf16", (3, 64), 48 + 6 * 2 + 2),  # 6 zero points of 2 bits take 12 bits
        ("w4g16sf8", (2, 64), 64 + 8 + 4),
        ("w4g16si8", (2, 64), 64 + 8 + 2 * 2),
        ("w16", (2, 3), 12),
        ("wfp8", (2, 3), 6 + 2 * 4),
        ("wfp8g8", (2, 16), 32 + 4 * 4),
        ("wfp8g8sf16", (2, 16), 32 + 4 * 2),
        ("wnvfp4", (2, 64), 64 + 8 + 4),  # a byte for each block of 16, and one float32
        ("wmxfp4", (2, 64), 64 + 4),  # a byte for each block of 32
    ],
)
def test_storage_bytes_of_weights_worked_out_by_hand(text: str, shape: tuple[int, ...], size_bytes: int) -> None:
    weight = Scheme.parse(text).weight
    assert weight is not None and weight.storage_bytes(shape) == size_bytes


@given(count=st.integers(0, 200), bits=st.sampled_from(list(PLANES)))
def test_packed_bytes_are_those_of_counting(count: int, bits: int) -> None:
    assert packed_bytes(count, bits) == counted_bytes(count, bits)


def test_codes_are_stored_as_planes_with_the_high_bits_first() -> None:
    assert {bits: bit_planes(bits) for bits in range(2, 9)} == {bits: PLANES[bits] for bits in range(2, 9)}


def test_codes_are_signed_over_the_whole_width() -> None:
    ranges = {fmt: WeightFormat(fmt).code_range for fmt in ("2", "3", "4", "5", "6", "7", "8")}
    expected = [(-2, 1), (-4, 3), (-8, 7), (-16, 15), (-32, 31), (-64, 63), (-128, 127)]
    assert list(ranges.values()) == expected
    assert {fmt: WeightFormat(fmt).bits for fmt in BITS} == BITS


@given(group=st.integers(1, 200), inputs=st.integers(1, 120))
def test_a_group_that_does_not_divide_the_inputs_is_refused_with_the_nearest_that_does(
    group: int, inputs: int
) -> None:
    weight = WeightFormat("4", group)
    if inputs in range(0, inputs + 1, group):
        check_group("fc", weight, (7, inputs))
        return
    with pytest.raises(InvalidRequest) as caught:
        check_group("fc", weight, (7, inputs))
    message = str(caught.value)
    assert message.startswith(f"Group size {group} of w4g{group} does not fit layer 'fc': its output channels read ")
    assert f"read {inputs} inputs each" in message
    nearest = int(message.removesuffix(".").rpartition(" is ")[2])
    fitting = [size for size in range(1, inputs + 1) if inputs in range(size, inputs + 1, size)]
    assert nearest in fitting
    assert abs(nearest - group) == min(abs(size - group) for size in fitting)


def test_a_group_counts_the_kernel_of_a_convolution_among_the_inputs() -> None:
    check_group("conv", WeightFormat("4", 9), (8, 2, 3, 3))
    with pytest.raises(InvalidRequest, match=r"read 18 inputs each\. The nearest group size .* is 18\."):
        check_group("conv", WeightFormat("4", 32), (8, 2, 3, 3))
