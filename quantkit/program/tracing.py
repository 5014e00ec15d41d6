"""One thread traces, the others wait: torch.export changes how every module of the process is called while it runs.

A call that came in between would land in the graph, or miss the hooks that say which module is running.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_changed = threading.Condition()
_own = threading.local()  # ``calling``: whether this thread is in such a block
_tracers: list[int] = []  # threads that trace or wait for it, the first come first
_callers = 0  # threads in a block that calls models


@contextmanager
def calling() -> Iterator[None]:
    """A block that calls modules: any number of threads may, while none traces. May be nested, and be in a trace."""
    global _callers
    if getattr(_own, "calling", False) or _tracers[:1] == [threading.get_ident()]:
        yield
        return
    with _changed:
        _changed.wait_for(lambda: not _tracers)
        _callers += 1
    _own.calling = True
    try:
        yield
    finally:
        _own.calling = False
        with _changed:
            _callers -= 1
            _changed.notify_all()


@contextmanager
def tracing() -> Iterator[None]:
    """A block that traces a module. Not inside ``calling``, where it would wait for itself."""
    me = threading.get_ident()
    with _changed:
        _tracers.append(me)
    try:  # from here on: who is interrupted while waiting must not keep the others out
        with _changed:
            _changed.wait_for(lambda: _tracers[0] == me and not _callers)
        yield
    finally:
        with _changed:
            _tracers.remove(me)
            _changed.notify_all()
