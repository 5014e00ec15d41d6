"""A latency table predicts what adding up by hand gives, and its data is whole or refused."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from quantkit.errors import InvalidRequest
from quantkit.plan.latency import LatencyTable, OperationTime, SiteTime
from quantkit.plan.operations import Execution

TABLE = LatencyTable(
    model="0123",
    threads=1,
    batch=8,
    rest_ns=7,
    operations={"conv": OperationTime(1000, 400, 700), "plus": OperationTime(30, 20, 20)},
    sites={"input": SiteTime(0, 5, 11, 13), "conv": SiteTime(1, 2, 17, 19)},
    notes={"host": "here", "float_ms": 1.5},
)


def execution(*names: str) -> Execution:
    """integer, coded, quantized, dequantized, wide."""
    return Execution(*(frozenset(text.split()) for text in (*names, "", "", "", "")[: max(4, len(names))]))


@pytest.mark.parametrize(
    ("ran", "expected"),
    [
        (execution(), 7 + 1000 + 30 + 0 + 1),
        (execution("conv", "input conv", "input", "conv"), 7 + 400 + 30 + (5 + 11) + (2 + 19)),
        (execution("conv plus", "input conv", "input"), 7 + 400 + 20 + (5 + 11) + 2),
        (execution("conv", "", "", "", "conv"), 7 + 700 + 30 + 0 + 1),
        (execution("", "conv", "conv", "conv"), 7 + 1000 + 30 + 0 + (2 + 17 + 19)),
        (execution("other", "elsewhere"), 7 + 1000 + 30 + 0 + 1),
    ],
)
def test_a_plan_takes_the_sum_of_its_parts(ran: Execution, expected: int) -> None:
    assert TABLE.predict(ran) == expected


def test_the_float_model_has_no_codes() -> None:
    assert TABLE.float_ns == TABLE.predict(execution())


def test_plain_data_comes_back_equal() -> None:
    assert LatencyTable.from_dict(asdict(TABLE)) == TABLE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"operations": {"conv": {"float_ns": 1.5, "integer_ns": 2, "wide_ns": 2}}},
            "conv.float_ns is 1.5, not a whole number",
        ),
        ({"operations": {"conv": {"float_ns": 1, "integer_ns": -2, "wide_ns": 2}}}, "conv.integer_ns is -2"),
        ({"operations": {"conv": {"float_ns": 1, "integer_ns": 2}}}, "wide_ns"),
        ({"operations": {"conv": {"float_ns": 1, "integer_ns": 2, "wide_ns": 2, "fast": 3}}}, "fast"),
        ({"sites": {"input": 3}}, "items"),
        ({"rest_ns": True}, "rest_ns is True"),
        ({"batch": "8"}, "batch is '8'"),
        ({"model": 7}, "model is not text"),
        ({"speed": 1}, "unknown key 'speed'"),
    ],
    ids=str,
)
def test_data_that_is_no_table_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises((KeyError, TypeError, ValueError, AttributeError), match=message):
        LatencyTable.from_dict(asdict(TABLE) | change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("0123", ["conv", "fc"], ["input"]), "it has no time for the layer 'fc'. Run `quantkit bench RECIPE`"),
        (("0123", ["conv"], ["input", "fc"]), "it has no time for the site 'fc'"),
        (("4567", ["conv"], ["input"]), "the same layer names and other shapes"),
    ],
)
def test_a_table_of_another_model_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        TABLE.require(*arguments)
    assert message in str(caught.value)
    TABLE.require("0123", ["conv"], ["input", "conv"])
