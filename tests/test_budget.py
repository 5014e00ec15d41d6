"""Every form of a budget that the design lists means what it says, and everything else is refused in words."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from math import floor
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.budget import Budget
from quantkit.errors import InvalidRequest
from quantkit.formats import Scheme
from quantkit.plan import Layer, Profile, SiteRecord

# 216 + 640 weights; the second layer is stored in float16; 72 bytes of biases.
LAYERS = {
    "conv": Layer("conv", "conv2d", (8, 3, 3, 3), float_bytes=864, macs=1000),
    "fc": Layer("fc", "linear", (10, 64), float_bytes=1280, macs=640),
}
WEIGHTS, OTHER_BYTES, MACS = 856, 72, 1640
PROFILE = Profile(
    LAYERS, {}, ("w4a8",), (), np.zeros(0), np.zeros((0, 0)), OTHER_BYTES, 864 + 1280 + OTHER_BYTES, "onnxruntime-cpu"
)  # fmt: skip
FLOAT32_BYTES = 4 * WEIGHTS + OTHER_BYTES

FORMS: list[tuple[Any, dict[str, str]]] = [
    ("4 bits", {"average_bits": "4 bits"}),
    ("4bits", {"average_bits": "4 bits"}),
    ("4-bit", {"average_bits": "4 bits"}),
    ("3.5 bits", {"average_bits": "3.5 bits"}),
    ("300 KB", {"size": "300 KB"}),
    ("  300kb ", {"size": "300 KB"}),
    ("300_000 bytes", {"size": "300000 B"}),
    ("1 byte", {"size": "1 B"}),
    ("1.5 MiB", {"size": "1.5 MiB"}),
    ("2e3 KiB", {"size": "2000 KiB"}),
    (".5 GB", {"size": "0.5 GB"}),
    ("25%", {"size": "25%"}),
    ("12.5 percent", {"size": "12.5%"}),
    ("4 bits, 300 KB", {"average_bits": "4 bits", "size": "300 KB"}),
    ("size=1 MiB,latency=60%", {"size": "1 MiB", "latency": "60%"}),
    ("average bits = 4", {"average_bits": "4 bits"}),
    ("bops=50%", {"bops": "50%"}),
    ("bops = 12 G", {"bops": "12 G"}),
    ("bops=12000", {"bops": "12000"}),
    ("bops=7 bops", {"bops": "7 bops"}),
    ("latency=3 ms", {"latency": "3 ms"}),
    ("latency=250 µs", {"latency": "250 us"}),
    ("activation_bytes=64 KB", {"activation_bytes": "64 KB"}),
    ("accuracy_drop=0.5", {"accuracy_drop": "0.5"}),
    ("accuracy_drop=1%", {"accuracy_drop": "1%"}),
    ({"size": "300 KB", "average_bits": 4}, {"size": "300 KB", "average_bits": "4 bits"}),
    ({"size": 2048, "bops": 1e6, "latency": None}, {"size": "2048 B", "bops": "1000000"}),
    ({"average_bits": "2.25 bits"}, {"average_bits": "2.25 bits"}),
    (Budget(size="1 MB", accuracy_drop=0.25), {"size": "1 MB", "accuracy_drop": "0.25"}),
]


@pytest.mark.parametrize(("written", "asked"), FORMS, ids=lambda value: str(value))
def test_every_form_is_read(written: Any, asked: dict[str, str]) -> None:
    budget = Budget.parse(written)
    assert budget.asked == asked
    assert budget.minimize is None


@pytest.mark.parametrize("written", ["accuracy_drop=1%, minimize=size", {"accuracy_drop": "1%", "minimize": "size"}])
def test_minimize_names_what_to_make_small(written: Any) -> None:
    budget = Budget.parse(written)
    assert (budget.asked, budget.minimize) == ({"accuracy_drop": "1%"}, "size")
    assert str(budget) == "accuracy_drop=1%, minimize=size"


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("w8a8", "w8a8"),
        (" W4G128 ", "w4g128"),
        ("w8a8d, 300 KB", "w8a8d, 300 KB"),
        ({"scheme": "w4", "average_bits": 5}, "w4, 5 bits"),
        (Scheme.parse("w3a8"), "w3a8"),
        (Budget(scheme="w8a8", accuracy_drop=1), "w8a8, accuracy_drop=1"),
    ],
    ids=str,
)
def test_a_scheme_is_a_budget(written: Any, text: str) -> None:
    budget = Budget.parse(written)
    assert str(budget) == text
    assert Budget.parse(str(budget)) == budget
    assert budget.scheme == text.partition(",")[0]


NOT_READ: list[tuple[Any, str]] = [
    ("small", "Cannot read the budget 'small': 'small' is not an amount with a unit. Understood: '4 bits', '300 KB'"),
    ("", "Cannot read the budget '': '' is not an amount with a unit."),
    ("4", "Cannot read the budget '4': '4' is not an amount with a unit."),
    ("4 apples", "Cannot read the budget '4 apples': '4 apples' is not an amount with a unit."),
    ("3 ms", "Cannot read the budget '3 ms': '3 ms' is not an amount with a unit."),
    ("4 bits,", "Cannot read the budget '4 bits,': '' is not an amount with a unit."),
    ("300,000 B", "Cannot read the budget '300,000 B': '300' is not an amount with a unit."),
    ("4 bits 300 KB", "Cannot read the budget '4 bits 300 KB'"),
    ("0x10 KB", "Cannot read the budget '0x10 KB'"),
    (4, "A budget is text, a mapping or a Budget; 4 has no unit. Understood: '4 bits'"),
    (None, "A budget is text, a mapping or a Budget; None has no unit."),
    (list(range(99)), "A budget is text, a mapping or a Budget; a list is none. Understood"),
    (["4 bits"], "A budget is text, a mapping or a Budget; ['4 bits'] has no unit."),
    ("size=big", "Cannot read size='big'. Understood: '4 bits'"),
    ("size=", "Cannot read size=''."),
    ("size=1.2.3 KB", "Cannot read size='1.2.3 KB'."),
    ("latency=3", "latency='3' needs a unit: ns, us, ms, s, %."),
    ("size=4 bits", "size='4 bits' needs a unit: B, KB, MB, GB, TB, KiB, MiB, GiB, TiB, %."),
    ("bops=5 B", "bops='5 B' needs a unit: bops, K, M, G, T, %."),
    ("activation_bytes=50%", "activation_bytes='50%' needs a unit: B, KB"),
    ("average_bits=4%", "average_bits='4%' needs a unit: bits."),
    ("accuracy_drop=1 bops", "accuracy_drop='1 bops' needs a unit: %."),
    ({"size": True}, "size=True is not an amount. Understood: '4 bits'"),
    ({"size": ["300 KB"]}, "size=['300 KB'] is not an amount."),
    ("4 bits, 5 bits", "The budget '4 bits, 5 bits' sets average_bits twice: keep the tighter one."),
    ("25%, 300 KB", "The budget '25%, 300 KB' sets size twice: keep the tighter one."),
    ("4 bits, average bits=5", "sets average_bits twice: keep the tighter one."),
    ("minimize=size, minimize=bops", "sets minimize twice"),
    (
        "sise=3 KB",
        "'sise' is not a limit. Did you mean 'size' or 'file_size'? Known limits: size, average_bits, bops, latency,",
    ),
    ({"acuracy_drop": 1}, "'acuracy_drop' is not a limit. Did you mean 'accuracy_drop'"),
    ({3: "4 bits"}, "3 is not a limit. Known limits: size"),
    ({}, "The budget names no limit. Understood: '4 bits'"),
    ({"size": None}, "The budget names no limit."),
    ("minimize=size", "The budget names no limit."),
    (
        "4 bits, minimize=sise",
        "minimize='sise' is not something a plan can make small; known: size, average_bits, bops,",
    ),
    ("w9a8", "Unknown scheme 'w9a8'. Expected 'float' or formats"),
    ("w8a8, w4a8", "The budget 'w8a8, w4a8' sets scheme twice"),
    ("w8a8, minimize=size", "minimize beside the scheme w8a8: a scheme leaves nothing to choose."),
    ({"scheme": "a8"}, "The budget 'a8' has no weight format"),
    ({"scheme": 8}, "A scheme is text such as 'w4a8' or 'float', not int."),
    ("4 bits, minimize=sise", "activation_bytes. Did you mean 'size'?"),
    ("4 bits, minimize=accuracy_drop", "minimize='accuracy_drop' is not something a plan can make small"),
]


@pytest.mark.parametrize(("written", "message"), NOT_READ, ids=lambda value: str(value)[:30])
def test_what_cannot_be_read_is_refused_with_what_can(written: Any, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Budget.parse(written)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "number", ["0", "-4", "-0.0", "nan", "inf", "-inf", "Infinity", "1e999999999", "1e-999999999"]
)
@pytest.mark.parametrize("limit", ["size={} KB", "size={}", "average_bits={} bits", "accuracy_drop={}%", "bops={} G"])
def test_amounts_that_are_not_finite_and_positive_are_refused(limit: str, number: str) -> None:
    written = limit.format(number)
    with pytest.raises(InvalidRequest) as caught:
        Budget.parse(written)
    name, _, amount = written.partition("=")
    assert f"{name}={amount!r}: a limit is a finite number above zero" in str(caught.value)


@pytest.mark.parametrize("number", [0, -1, 0.0, -2.5, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["size", "average_bits", "bops", "activation_bytes", "accuracy_drop"])
def test_numbers_that_are_not_finite_and_positive_are_refused(name: str, number: float) -> None:
    with pytest.raises(InvalidRequest, match=f"{name}='{number}': a limit is a finite number above zero"):
        Budget(**{name: number})


LIMITS: list[tuple[Any, dict[str, int]]] = [
    ("4 bits", {"average_bits": WEIGHTS // 2}),
    ("4.5 bits", {"average_bits": 481}),  # 856 * 4.5 / 8 = 481.5
    ("300 KB", {"size": 300_000}),
    ("1.005 KB", {"size": 1005}),  # 1.005 * 1000 is 1004.999... in floats
    ("1.5 KiB", {"size": 1536}),
    ("25%", {"size": 874}),  # a quarter of 3,496 bytes
    ("33%", {"size": 1153}),  # 1153.68
    ("2 KB, 3 bits, bops=50%", {"size": 2000, "average_bits": 321, "bops": 512 * MACS}),
    ("bops=12 K", {"bops": 12_000}),
    ("bops=1.5 bops", {"bops": 1}),
    ({"size": 2048.9, "average_bits": 8}, {"size": 2048, "average_bits": WEIGHTS}),
]


@pytest.mark.parametrize(("written", "limits"), LIMITS, ids=lambda value: str(value))
def test_limits_are_whole_numbers_worked_out_by_hand(written: Any, limits: dict[str, int]) -> None:
    found = Budget.parse(written).limits(PROFILE)
    assert found == limits
    assert {type(value) for value in found.values()} == {int}


BYTES = {"B": 1, "KB": 1000, "MB": 10**6, "GB": 10**9, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
UNITS = {
    "size": {unit: Fraction(size) for unit, size in BYTES.items()} | {"%": Fraction(FLOAT32_BYTES, 100)},
    "average_bits": {"bits": Fraction(WEIGHTS, 8)},
    "bops": {"": Fraction(1), "K": Fraction(10**3), "G": Fraction(10**9), "%": Fraction(32 * 32 * MACS, 100)},
}
amounts = st.sampled_from([(name, unit) for name, units in UNITS.items() for unit in units])


@given(amount=amounts, digits=st.integers(1, 10**9), decimals=st.integers(0, 6))
def test_a_limit_is_the_amount_times_its_unit_rounded_down(
    amount: tuple[str, str], digits: int, decimals: int
) -> None:
    name, unit = amount
    whole, part = divmod(digits, 10**decimals)
    written = f"{name}={whole}.{part:0{decimals}d} {unit}" if decimals else f"{name}={whole} {unit}"
    expected = floor(Fraction(digits, 10**decimals) * UNITS[name][unit])
    assert Budget.parse(written).limits(PROFILE) == {name: expected}


@given(amount=amounts, needed=st.integers(1, 10**12))
def test_asking_for_the_smallest_that_was_reported_is_enough_and_not_wasteful(
    amount: tuple[str, str], needed: int
) -> None:
    name, unit = amount
    budget = Budget.parse(f"{name}=1 {unit}")
    assert budget.unit(name) == unit
    reported = budget.in_asked_unit(name, needed, PROFILE)
    assert Budget.parse(f"{name}={reported!r} {unit}").limits(PROFILE)[name] >= needed
    assert (Fraction(reported) - Fraction(1, 500)) * UNITS[name][unit] < needed


WRITTEN = {
    "size": ["1 B", "0.1 KB", "2.5 MiB", "25%", "1e-05 GB", "123456789 B"],
    "average_bits": ["4", "2.125 bits", "1e-3 bits"],
    "bops": ["7", "50%", "1.5 G", "3 bops"],
    "latency": ["60%", "3 ms", "0.25 s", "10 us"],
    "activation_bytes": ["64 KB", "1 KiB"],
    "accuracy_drop": ["0.5", "1%"],
    "minimize": ["size", "latency"],
}
mappings = st.fixed_dictionaries({}, optional={name: st.sampled_from(texts) for name, texts in WRITTEN.items()})


@given(mappings.filter(lambda mapping: set(mapping) - {"minimize"}))
def test_a_budget_reads_back_from_its_own_text(mapping: dict[str, str]) -> None:
    budget = Budget.parse(mapping)
    assert set(budget.asked) == set(mapping) - {"minimize"}
    assert Budget.parse(str(budget)) == budget
    assert Budget.parse(budget) is budget


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("latency=60%", "latency=60% needs times measured on this machine: run `quantkit bench RECIPE` and pass"),
        ("activation_bytes=64 KB", "activation_bytes=64 KB needs to know which operations make and read the sites"),
    ],
)
def test_a_limit_that_a_profile_cannot_answer_is_refused(limit: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Budget.parse(f"1 KB, {limit}").limits(replace(PROFILE, sites={"input": SiteRecord("input", 192)}))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("text", ["4 bits, minimize=size", "4 bits, accuracy_drop=1%", "accuracy_drop=0.5"])
def test_a_limit_on_accuracy_is_nothing_a_profile_alone_can_meet(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"needs the model: use quantize with evaluate="):
        Budget.parse(text).limits(PROFILE)


def test_accuracy_stands_apart_from_the_other_limits() -> None:
    both = Budget.parse("4 bits, accuracy_drop=1%, minimize=bops")
    assert both.without_accuracy() == Budget(average_bits=4)
    assert Budget(accuracy_drop=0.5).without_accuracy() is None
    assert both.allowed_drop(80.0) == pytest.approx(0.8)
    assert both.allowed_drop(-2.0) == pytest.approx(0.02)
    assert Budget(accuracy_drop=0.5).allowed_drop(80.0) == 0.5
    with pytest.raises(InvalidRequest, match="does not limit the accuracy"):
        Budget.parse("4 bits").allowed_drop(80.0)


@given(st.text(alphabet="0123456789.,=+-_ %e" + "bitskKMBzopslatencyv", max_size=16))
def test_any_text_is_either_refused_in_words_or_a_budget_that_reads_back(text: str) -> None:
    try:
        budget = Budget.parse(text)
    except InvalidRequest as error:
        assert len(str(error)) > 30
        return
    assert budget.asked
    assert Budget.parse(str(budget)) == budget


def test_confidence_goes_with_accuracy() -> None:
    budget = Budget.parse("accuracy_drop=0.5, confident=true")
    assert budget.confident is True
    assert Budget.parse(str(budget)) == budget
    assert Budget(accuracy_drop=1).confident is False
    with pytest.raises(InvalidRequest, match="confident='perhaps' is neither true nor false"):
        Budget(accuracy_drop=1, confident="perhaps")
    with pytest.raises(InvalidRequest, match="add accuracy_drop"):
        Budget.parse("4 bits, confident=true")
