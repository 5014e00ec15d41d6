"""One live line per long stage, with time left, and notices: the only place that talks to the terminal."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
log = logging.getLogger("quantkit")


def track(items: Iterable[T], stage: str, total: int | None = None, enabled: bool = True) -> Iterator[T]:
    """Yield ``items`` while a line on stderr shows how many are done and the time left.

    Where stderr is not a terminal the line is refreshed rarely, so that logs stay readable.
    """
    interval = 0.2 if sys.stderr.isatty() else 30.0
    with tqdm(items, desc=stage, total=total, disable=not enabled, mininterval=interval, leave=False) as line:
        yield from line


def notice(message: str) -> None:
    """Tell the user something they should know but need not act on (a logging record of level INFO)."""
    log.info(message)


def warn(message: str) -> None:
    """Tell the user something that changes what they get (a logging record of level WARNING)."""
    log.warning(message)
