"""Progress goes to stderr, notices to the log, and the items pass through untouched."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from quantkit.progress import notice, one_call, said, track, warn


@pytest.mark.parametrize("enabled", [True, False])
def test_items_come_one_at_a_time_and_in_order(enabled: bool) -> None:
    taken = []

    def items() -> Iterator[int]:
        for item in range(4):
            taken.append(item)
            yield item

    tracked = track(items(), "measuring", enabled=enabled)
    assert taken == []
    assert next(tracked) == 0
    assert taken == [0]
    assert list(tracked) == [1, 2, 3]


def test_the_line_names_the_stage_and_the_total_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(iter("abc"), "measuring", total=3)) == ["a", "b", "c"]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "measuring" in captured.err and "/3" in captured.err


def test_a_log_gets_few_lines_however_many_items_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    list(track(range(5000), "measuring"))
    assert capsys.readouterr().err.count("measuring") <= 2


def test_nothing_is_drawn_when_progress_is_off(capsys: pytest.CaptureFixture[str]) -> None:
    list(track(range(3), "measuring", enabled=False))
    assert capsys.readouterr() == ("", "")


def test_an_error_in_the_items_reaches_the_caller() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise RuntimeError("no more batches")

    with pytest.raises(RuntimeError, match="no more batches"):
        list(track(items(), "measuring"))


def test_notices_and_warnings_are_log_records_of_quantkit(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="quantkit"):
        notice("reusing the profile")
        warn("no calibration data")
    assert caplog.record_tuples == [
        ("quantkit", logging.INFO, "reusing the profile"),
        ("quantkit", logging.WARNING, "no calibration data"),
    ]


def test_a_message_is_said_once_in_a_call_and_kept(caplog: pytest.LogCaptureFixture) -> None:
    with one_call():
        notice("one")
        with one_call():
            notice("one")
            warn("two")
        assert said() == ["one", "two"]
    notice("one")
    assert [record.getMessage() for record in caplog.records] == ["one", "two", "one"]
    assert said() == []


SCRIPT = """
import logging, sys
from quantkit.progress import notice, warn
{setup}
notice("a notice")
warn("a warning")
"""


@pytest.mark.parametrize(
    ("setup", "shown"),
    [
        ("", ["quantkit: a notice", "quantkit: a warning"]),
        ("logging.basicConfig(format='%(levelname)s %(message)s')", ["INFO a notice", "WARNING a warning"]),
        ("logging.getLogger('quantkit').setLevel(logging.WARNING)", ["quantkit: a warning"]),
        ("logging.getLogger('quantkit').addHandler(logging.StreamHandler())", ["a notice", "a warning"]),
    ],
    ids=["nothing set up", "logging set up", "silenced", "a handler of the user's"],
)
def test_what_a_script_shows(setup: str, shown: list[str]) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(setup=setup)], capture_output=True, text=True, check=True
    )
    assert ran.stderr.splitlines() == shown
    assert ran.stdout == ""
