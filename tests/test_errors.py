"""Errors carry what a caller acts on: the exit code, the limit and what can be reached, the nearest names."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import (
    AccuracyNotMet,
    CorruptFile,
    InfeasibleBudget,
    InvalidRequest,
    ParityError,
    QuantkitError,
    did_you_mean,
)

EXIT_CODES = {InvalidRequest: 1, CorruptFile: 1, InfeasibleBudget: 2, AccuracyNotMet: 3, ParityError: 3}


@pytest.mark.parametrize(("kind", "code"), EXIT_CODES.items(), ids=lambda value: getattr(value, "__name__", value))
def test_each_error_has_the_exit_code_of_the_design(kind: type[QuantkitError], code: int) -> None:
    error = kind("what was asked, found and to try")
    assert isinstance(error, QuantkitError)
    assert (error.exit_code, str(error)) == (code, "what was asked, found and to try")


def test_a_bad_request_can_be_caught_as_a_value_error() -> None:
    with pytest.raises(ValueError, match="no such layer"):
        raise InvalidRequest("no such layer")


def test_an_infeasible_budget_tells_the_limit_and_the_smallest() -> None:
    error = InfeasibleBudget("too small", "size=3 KB", 4.25)
    assert (error.limit, error.smallest) == ("size=3 KB", 4.25)
    assert math.isnan(InfeasibleBudget("too small").smallest)


def test_an_unmet_accuracy_tells_the_best_plan_and_the_curve() -> None:
    error = AccuracyNotMet("too inaccurate", best="plan", curve=[(300, 0.9), (400, 0.95)])
    assert (error.best, error.curve) == ("plan", ((300, 0.9), (400, 0.95)))


@pytest.mark.parametrize(
    ("name", "known", "sentence"),
    [
        ("sise", ["size", "bops", "latency"], " Did you mean 'size'?"),
        ("conv", ["fc", "conv2", "conv1"], " Did you mean 'conv2' or 'conv1'?"),
        ("zzz", ["size", "bops"], ""),
        ("size", [], ""),
    ],
)
def test_the_nearest_names_are_offered(name: str, known: list[str], sentence: str) -> None:
    assert did_you_mean(name, known) == sentence


words = st.text("abcde", min_size=1, max_size=6)


@given(name=words, known=st.lists(words, unique=True, max_size=6))
def test_at_most_three_names_are_offered_and_all_are_known(name: str, known: list[str]) -> None:
    sentence = did_you_mean(name, known)
    offered = [word for word in known if repr(word) in sentence]
    assert bool(offered) == bool(sentence)
    assert len(offered) <= 3 and sentence.count("'") == 2 * len(offered)
    assert name not in known or repr(name) in sentence
