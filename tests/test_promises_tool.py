"""The rule that promises are held to."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))
from study_promises import Promise

MB = 1_000_000


def promise(megabytes: tuple[float, float] = (100, 100), seconds: tuple[float, float] = (10, 10)) -> Promise:
    """Announced and measured."""
    return Promise("network", "apply", megabytes[0] * MB, megabytes[1] * MB, *seconds)


@pytest.mark.parametrize(
    ("megabytes", "kept"),
    [
        ((100, 149), True),
        ((100, 151), False),
        ((399, 100), True),
        ((401, 100), False),
        ((0, 12), True),
        ((0, 13), False),
    ],
)
def test_memory_is_not_much_more_than_announced_nor_much_less(megabytes: tuple[float, float], kept: bool) -> None:
    assert promise(megabytes).memory_kept is kept
    assert promise(megabytes).row.endswith("| yes |" if kept else "| not memory |")


@pytest.mark.parametrize(
    ("seconds", "kept"),
    [((10, 19), True), ((10, 21), False), ((19, 10), True), ((21, 10), False), ((0.01, 0.9), True)],
)
def test_time_is_within_a_factor_of_two(seconds: tuple[float, float], kept: bool) -> None:
    assert promise(seconds=seconds).time_kept is kept
    assert promise(seconds=seconds).row.endswith("| yes |" if kept else "| not time |")
