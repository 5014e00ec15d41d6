"""One live line per long stage, with time left, and notices: the only place that talks to the terminal."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
log = logging.getLogger("quantkit")
_said: ContextVar[dict[str, None] | None] = ContextVar("said", default=None)


def track(items: Iterable[T], stage: str, total: int | None = None, enabled: bool = True) -> Iterator[T]:
    """Yield ``items`` while a line on stderr shows how many are done and the time left.

    Where stderr is not a terminal the line is refreshed rarely, so that logs stay readable.
    """
    interval = 0.2 if sys.stderr.isatty() else 30.0
    with tqdm(items, desc=stage, total=total, disable=not enabled, mininterval=interval, leave=False) as line:
        yield from line


class _ToStderr(logging.Handler):
    """Shows records where nobody set up logging, so that they are seen by whoever calls from Python."""

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger().handlers or log.handlers != [self]:
            return  # whoever set up logging decides what is shown
        print(f"quantkit: {record.getMessage()}", file=sys.stderr)


log.addHandler(_ToStderr())
log.setLevel(logging.INFO)  # of this logger alone: setLevel(logging.WARNING) on it silences notices


@contextmanager
def one_call() -> Iterator[None]:
    """A call of a verb, or a part of one: what is said in it is said once, and ``said`` lists it."""
    token = _said.set({}) if _said.get() is None else None
    try:
        yield
    finally:
        if token is not None:
            _said.reset(token)


def said() -> list[str]:
    """The notices and warnings of the call so far, in order."""
    return list(_said.get() or ())


def notice(message: str) -> None:
    """Tell the user something they should know but need not act on: a logging record of level INFO, on stderr where
    logging is not set up.
    """
    _tell(logging.INFO, message)


def warn(message: str) -> None:
    """Tell the user something that changes what they get: the same of level WARNING."""
    _tell(logging.WARNING, message)


def _tell(level: int, message: str) -> None:
    before = _said.get()
    if before is not None and message in before:
        return
    if before is not None:
        before[message] = None
    log.log(level, message)
